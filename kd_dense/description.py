"""What an adapter tells the core about a model that its module names do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

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
    """

    model: nn.Module
    run: Callable[[], tuple[int, int]]
    aliases: dict[str, list[str]] = field(default_factory=dict)
    logits: Logits | str = 'this model has no class logits that kd_dense knows how to read'
    absent: dict[str, str] = field(default_factory=dict)
    normalization: Normalization | None = None
    alternatives: tuple[Callable[[], tuple[int, int]], ...] = ()


@dataclass(frozen=True)
class Probe:
    """What the dry forward found for one distiller on one side.

    Args:
        shapes: role -> shapes of the tensors that the distiller will be given under it.
        names: role -> the tap names behind them.
        canvas: ``(H, W)`` in pixels of the batch that was run.
        logits, normalization: see :class:`Description`.
    """

    shapes: dict[str, list[torch.Size]]
    names: dict[str, tuple[str, ...]]
    canvas: tuple[int, int]
    logits: Logits | str
    normalization: Normalization | None = None

    def strides(self, role: str) -> list[float | None]:
        """Pixels per cell of each map under ``role``; ``None`` for tensors that are no ``[B, C, h, w]`` map."""
        views = any('@' in name for name in self.names[role])  # matrices of attention, say
        return [self.canvas[0] / s[2] if len(s) == 4 and s[2] and not views else None for s in self.shapes[role]]
