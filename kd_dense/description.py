"""What an adapter tells the core about a model that its module names do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd_dense.teacher import Normalization


@dataclass(frozen=True)
class Logits:
    """How to read the class logits at the tap ``logits``.

    Args:
        num_classes: classes ``C`` per position.
        activation: ``'softmax'`` over the classes, or ``'sigmoid'`` for each class on its own.
        layout: ``'map'``: ``[B, A*C, h, w]`` per level with ``A`` anchors per cell (segmentation: one map, ``A = 1``);
            ``'query'``: ``[..., B, Q, C]`` for heads that predict a set, of which the last decoder layer is used.
        classes: class names, where the adapter knows them.
    """

    num_classes: int
    activation: str
    layout: str = 'map'
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Boxes:
    """How to read the boxes at the tap ``boxes``: maps ``[B, A * V, h, w]`` by level, ``V`` numbers for each of ``A``
    anchors of a cell.

    Args:
        kind: what a box is given by.
            ``'distribution'``: ``V = 4 * bins`` logits, of the left, top, right and bottom side one after the other;
            bin ``k`` is a distance of ``k`` strides from a point;
            ``'distance'``: ``V = 4`` distances left, top, right, bottom from a point;
            ``'delta'``: ``V = 4`` changes of an anchor, ``* stds + means``: centre in sizes of the anchor, logarithm of
            the size;
            ``'corners'``: ``V = 4``, ``x1, y1, x2, y2`` on the canvas in strides of the level.
        strides: pixels per cell of each level, in the order of the tap.
        bins: of each side of a distribution.
        anchors: of each level, those of the cell at the top left: ``x1, y1, x2, y2`` in pixels. Distances count from
            their centres. Empty for heads that measure from points, or change squares of one stride around them.
        offset: of that point from the top left corner of its cell, in strides; where there are no anchors.
        unit: of distances, ``'stride'`` or ``'pixel'``.
        means, stds: of deltas.
    """

    kind: str
    strides: tuple[float, ...]
    bins: int = 1
    anchors: tuple[tuple[tuple[float, ...], ...], ...] = ()
    offset: float = 0.5
    unit: str = 'stride'
    means: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Queries:
    """How to read the set of objects that a detection transformer predicts.

    Args:
        count: queries ``Q`` of each image; in training others, for denoising, may come before them.
        num_classes: classes ``C`` without background.
        activation: ``'sigmoid'`` for each class on its own, or ``'softmax'`` over ``C + 1`` with the background last.
    """

    count: int
    num_classes: int
    activation: str


#: Aliases that stand for class predictions, which are comparable only between equal class lists: of one branch of the
#: head, of its other one where there are two, and of all.
CLASS_TAPS = ('logits', 'logits_one2one', 'branch_logits')
#: Aliases of a model with queries: class logits ``[L, B, Q, C or C + 1]`` and boxes ``[L, B, Q, 4]`` (``cx, cy, w, h``
#: in shares of the image) of its ``L`` decoder layers; the encoder's output ``[B, N, channels]``; and maps of its
#: levels, whose cells follow each other in that output.
QUERY_TAPS = ('query_logits', 'query_boxes', 'encoder_memory', 'encoder_levels')


@dataclass(frozen=True)
class RoIStage:
    """How to read what one stage of a RoI head predicts; a cascade has several stages.

    Args:
        num_classes: foreground classes ``K``; the background is class ``K``, the last of the ``K + 1`` of the softmax.
        class_agnostic: one box for all classes, ``[R, 4]`` deltas instead of ``[R, 4 K]``.
        means, stds: a box is ``deltas * stds + means`` away from its region: centre in sizes of the region, logarithm
            of the size.
        positive_iou: overlap with an object from which on a region is trained to be a positive of this stage.
        weight: of this stage in the model's own loss.
        mask_agnostic: one mask for all classes, ``[P, 1, h, w]`` logits instead of ``[P, K, h, w]``; ``None``: no masks
            at all.
    """

    num_classes: int
    class_agnostic: bool = False
    means: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    positive_iou: float = 0.5
    weight: float = 1.0
    mask_agnostic: bool | None = None


#: Aliases of a model with a RoI head, each with one member for each stage. Box head: regions ``[R, 5]``, class logits
#: ``[R, K + 1]`` and box deltas there. Mask head: regions ``[P, 5]`` and mask logits there. Last, the levels on which a
#: teacher's RoI head looks at the student's regions.
ROI_TAPS = ('rois', 'classes@rois', 'deltas@rois', 'mask_rois', 'masks@mask_rois', 'roi_features')


@dataclass
class Description:
    """One side of a distillation, teacher or student, as its adapter describes it.

    Args:
        model: the model whose modules are tapped.
        run: runs the plain forward on a made-up batch and returns the canvas ``(H, W)`` in pixels; for the dry forward.
        aliases: names for places that are no module: alias -> tap names.
        logits: how to read the alias ``logits``, or one sentence that says why this model has none.
        absent: names that are aliases in other models -> one sentence that says why this one has no such place.
        normalization: of the images that the model is given; ``None``: pixel values 0..255.
        alternatives: to ``run``, tried in turn where that fails, or where a tap does not fire in it.
        rois: how to read the aliases in :data:`ROI_TAPS`, stage by stage, or one sentence that says why this model has
            none.
        queries: how to read the aliases in :data:`QUERY_TAPS`, or one sentence that says why this model has none.
        boxes: how to read the alias ``boxes``, or one sentence that says why this model has none.
        recorded: for a model that is not there: tap names -> tap name -> tensors of a dry forward, and the canvas. It
            is asked instead of ``run``.
    """

    model: nn.Module
    run: Callable[[], tuple[int, int]]
    aliases: dict[str, list[str]] = field(default_factory=dict)
    logits: Logits | str = 'this model has no class logits that kd_dense knows how to read'
    absent: dict[str, str] = field(default_factory=dict)
    normalization: Normalization | None = None
    alternatives: tuple[Callable[[], tuple[int, int]], ...] = ()
    rois: tuple[RoIStage, ...] | str = (
        'it has no RoI head, as two-stage detectors do; distil with LogitKD and LocalizationKD, with QueryKD (DETR '
        'family), or features with PKD'
    )
    queries: Queries | str = (
        'it predicts no set of objects by the queries of a transformer; distil with LogitKD and LocalizationKD, with '
        'RoIKD (two-stage detectors), or features with PKD'
    )
    boxes: Boxes | str = 'this model has no boxes for each cell that kd_dense knows how to read'
    recorded: Callable[[list[str]], tuple[dict[str, list[Tensor]], tuple[int, int]]] | None = None


@dataclass(frozen=True)
class Probe:
    """What the dry forward found for one distiller on one side.

    Args:
        shapes: role -> shapes of the tensors that the distiller will be given under it.
        names: role -> the tap names behind them.
        canvas: ``(H, W)`` in pixels of the batch that was run.
        logits, normalization, rois, queries, boxes: see :class:`Description`.
    """

    shapes: dict[str, list[torch.Size]]
    names: dict[str, tuple[str, ...]]
    canvas: tuple[int, int]
    logits: Logits | str
    normalization: Normalization | None = None
    rois: tuple[RoIStage, ...] | str = Description.rois
    queries: Queries | str = Description.queries
    boxes: Boxes | str = Description.boxes

    def strides(self, role: str) -> list[float | None]:
        """Pixels per cell of each map under ``role``; ``None`` for tensors that are no ``[B, C, h, w]`` map."""
        # matrices of attention, say, or predictions of several decoder layers
        views = any('@' in name or name.split(':')[0] in QUERY_TAPS[:2] for name in self.names[role])
        return [self.canvas[0] / s[2] if len(s) == 4 and s[2] and not views else None for s in self.shapes[role]]
