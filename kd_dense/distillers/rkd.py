"""Relational knowledge distillation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kd_dense.connectors import as_map, match_size
from kd_dense.context import Context
from kd_dense.description import Logits, Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe, octaves, paired_shapes
from kd_dense.distillers.cwd import not_negative
from kd_dense.errors import ConfigError
from kd_dense.geometry.regions import class_tokens, grid_tokens, image_tokens, roi_tokens
from kd_dense.losses.relation import LEAST, angle_loss, distance_loss
from kd_dense.random_state import step_seed
from kd_dense.registry import DISTILLERS

#: What an example may be.
MODES = ('roi', 'class', 'image', 'grid')


class Examples(NamedTuple):
    """One set of examples whose relations are compared.

    Args:
        student, teacher: ``[N, d_S]`` and ``[N, d_T]``, row by row the same examples.
        valid: boolean ``[N]``; ``None``: all count.
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor | None = None


@DISTILLERS.register_module()
class RKD(Distiller):
    """Match the relations between examples: distances of pairs, relative to their mean, and angles of triplets.

    ``L = distance * L_D + angle * L_A`` of embeddings ``e_1 .. e_N`` of both networks, with Huber's function ``h``::

        L_D = mean over i, j    of h(|e_i - e_j|_S / mu_S - |e_i - e_j|_T / mu_T)     mu: mean over pairs i != j
        L_A = mean over i, j, k of h(cos_S(i; j, k) - cos_T(i; j, k))                 angle at i between j and k

    Scale, position and rotation of the embeddings do not matter, and their widths may differ, so there is no connector.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019; equations, means (over all ``N^2`` and ``N^3``
    terms) and the weights 1 and 2 of metric learning are confirmed by the authors' public code. Two public toolboxes
    use 25 and 50 for classification. The paper knows whole images only; what an example is in dense prediction is
    **our choice**:

    * ``'roi'``: the mean feature inside each ground-truth box, from the level that fits its size, boxes of all images
      together; see :func:`~kd_dense.geometry.regions.roi_tokens`. Student and teacher are pooled with the same boxes.
    * ``'class'``: the mean feature of each class that is present in an image, images together.
    * ``'image'``: the mean feature of each image, of all processes together. Needs three images or more.
    * ``'grid'``: the mean feature of each cell of a coarse grid; needs no labels.

    The last three form one set for each level, and the losses are the means over the levels. Fewer than three examples
    have no relation, and no loss.

    Args:
        taps: maps; in mode ``'image'`` tokens and vectors as well. Segmentors without a neck: ``'backbone:3'``.
        mode: see above. ``None``: ``'class'`` where the task has a label map, else ``'roi'``.
        distance, angle: weights of the two terms; 0 leaves one out.
        max_examples: of a set; more of them are subsampled at random, because there are ``N^3`` angles. Drawn from
            ``seed``, the iteration and the process, never from the random state of the student.
        per_image: one set for each image that has three examples, instead of one over the images; the mean over them.
        grid: cells per side in mode ``'grid'``.
        num_classes: in mode ``'class'``; ``None``: as many as the student's logits have.
        normalize_student, normalize_teacher: scale embeddings to length 1. The authors' scripts do so for the teacher
            only, the two toolboxes for both or for neither.
        exclude_degenerate: leave pairs and triplets in which an example occurs twice out of the means.
        use_mask: leave padding and ignored pixels out, modes ``'image'`` and ``'grid'``.
        seed: of the subsampling.
    """

    def __init__(
        self,
        taps: TapConfig = 'neck',
        mode: str | None = None,
        distance: float = 1.0,
        angle: float = 2.0,
        max_examples: int = 128,
        per_image: bool = False,
        grid: int = 8,
        num_classes: int | None = None,
        normalize_student: bool = False,
        normalize_teacher: bool = False,
        exclude_degenerate: bool = False,
        use_mask: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode is not None and mode not in MODES:
            raise ConfigError(f'mode must be one of {list(MODES)}, or None to choose by the task, not {mode!r}')
        if mode == 'image' and per_image:
            raise ConfigError("per_image: mode 'image' has one example per image; use another mode or per_image=False")
        weights = {'distance': distance, 'angle': angle}
        for name, weight in weights.items():
            not_negative(weight, name)
        if not any(weights.values()):
            raise ConfigError('distance and angle are both 0, so there is nothing to distil; set one of them')
        least = {'max_examples': (max_examples, LEAST), 'grid': (grid, 2), 'num_classes': (num_classes, 1)}
        for name, (value, smallest) in least.items():
            if value is not None and (not isinstance(value, int) or value < smallest):
                raise ConfigError(f'{name} must be a whole number >= {smallest}, not {value!r}')
        self.taps = {'features': TapPair.parse(taps)}
        self.needs_boxes = mode == 'roi'
        self.mode, self.max_examples, self.per_image, self.grid = mode, max_examples, per_image, grid
        self.num_classes, self.use_mask, self.seed = num_classes, use_mask, seed
        self.normalize_student, self.normalize_teacher = normalize_student, normalize_teacher
        self.exclude_degenerate = exclude_degenerate
        functions = {'distance': distance_loss, 'angle': angle_loss}
        self.terms: dict[str, tuple[float, Callable]] = {n: (w, functions[n]) for n, w in weights.items() if w}
        self._octaves: list[int] = []
        self._misfits: dict[str, str | None] = {}
        self._related: Tensor | None = None

    def setup(self, student: Probe, teacher: Probe) -> None:
        shapes = paired_shapes(student, teacher, 'features')
        if self.mode != 'image' and any(len(x) != 4 for pair in shapes for x in pair):
            raise ConfigError(
                f'taps: RKD pools maps [B, C, h, w], not {describe(student, "features")} (student) and '
                f"{describe(teacher, 'features')} (teacher); tokens and vectors are for mode 'image'"
            )
        self._octaves = octaves(student, 'features')
        if self.num_classes is None and isinstance(student.logits, Logits):
            self.num_classes = student.logits.num_classes
        self._misfits = {'roi': self._roi_misfit(student, teacher), 'class': self._class_misfit()}
        self._refuse(self.mode)

    def _roi_misfit(self, student: Probe, teacher: Probe) -> str | None:
        """Boxes choose a level by its stride, and relate to boxes of other levels."""
        for probe, side in ((student, 'student'), (teacher, 'teacher')):
            if len({shape[1] for shape in probe.shapes['features']}) > 1:
                return (
                    f"taps: mode 'roi' relates boxes of all levels to each other, which needs levels of equal width, "
                    f'not {describe(probe, "features")} ({side}); tap the neck, or a single level'
                )
        if len(set(self._octaves)) < len(self._octaves):
            return (
                f"taps: mode 'roi' chooses a level for each box by its stride, but {describe(student, 'features')} has "
                'two of equal stride; tap one of them'
            )
        return None

    def _class_misfit(self) -> str | None:
        if self.num_classes is not None:
            return None
        return (
            "num_classes: mode 'class' needs the number of classes of the label map, which the student does not say; "
            'give num_classes'
        )

    def _refuse(self, mode: str | None) -> None:
        """Without a mode, what does not fit is no mistake before the task is known."""
        reason = self._misfits.get(mode)
        if reason is not None:
            raise ConfigError(reason)

    # -- one step ------------------------------------------------------------------------------------------------------

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        mode = self.mode_for(context)
        form = getattr(self, f'_{mode}')
        levels = [self._normalized(sets) for sets in form(student['features'], teacher['features'], context)]
        if self._related is None and mode != 'roi':
            self._check_sizes(mode, levels)
        self._related = torch.stack([_has_relations(examples) for sets in levels for examples in sets]).any()
        losses = {}
        for name, (weight, function) in self.terms.items():
            values = [self._mean(function, sets) for sets in levels]
            losses[f'{name}_loss'] = weight * (sum(values) / len(values))
        return losses

    def mode_for(self, context: Context) -> str:
        """The mode for a batch.

        Raises:
            ConfigError: the task does not have the ground truth for it.
        """
        mode = self.mode or ('roi' if context.label_map is None else 'class')
        if mode == 'roi' and context.boxes is None:
            raise ConfigError("mode: 'roi' needs ground-truth boxes, which this task has not; use 'class' or 'grid'")
        if mode == 'class' and context.label_map is None:
            raise ConfigError("mode: 'class' needs a label map, which this task has not; use 'roi' or 'grid'")
        self._refuse(mode)
        return mode

    def _check_sizes(self, mode: str, levels: list[list[Examples]]) -> None:
        """In the first step: can there ever be relations? How many boxes there are is up to the batch instead."""
        for sets in levels:
            most = max(len(examples.student) for examples in sets)
            if most < LEAST:
                raise ConfigError(
                    f'mode: {mode!r} finds {most} examples here, and relations need {LEAST}; '
                    'take a larger batch' + (' or per_image=False' if self.per_image else '') + ', or another mode'
                )

    def _normalized(self, sets: list[Examples]) -> list[Examples]:
        def scaled(x: Tensor, wanted: bool) -> Tensor:
            return F.normalize(x, dim=-1) if wanted else x

        return [
            Examples(scaled(s, self.normalize_student), scaled(t, self.normalize_teacher), valid)
            for s, t, valid in sets
        ]

    def _mean(self, function: Callable, sets: list[Examples]) -> Tensor:
        """Mean over the sets that have relations."""
        if len(sets) == 1:
            return function(*sets[0], self.exclude_degenerate)
        total = sum(function(*examples, self.exclude_degenerate) for examples in sets)
        return total / sum(_has_relations(examples).int() for examples in sets).clamp(min=1)

    def compared_nothing(self) -> Tensor | None:
        return None if self._related is None else ~self._related

    # -- examples ------------------------------------------------------------------------------------------------------

    def _roi(self, student: list[Tensor], teacher: list[Tensor], context: Context) -> list[list[Examples]]:
        boxes = self._chosen_boxes(context)
        ours, theirs = (roi_tokens(maps, boxes, self._octaves, context.canvas) for maps in (student, teacher))
        if self.per_image:
            return [[Examples(s, t) for s, t in zip(ours, theirs, strict=True)]]
        return [[Examples(torch.cat(ours), torch.cat(theirs))]]

    def _chosen_boxes(self, context: Context) -> list[Tensor]:
        """The boxes, or ``max_examples`` of them (of each image: ``per_image``), every choice being equally likely.

        How many an image may keep is drawn on the host, which ones on the device: no index is copied to or from it.
        """
        boxes, limit = context.boxes, self.max_examples
        counts = [len(b) for b in boxes]
        if self.per_image:
            kept = [min(n, limit) for n in counts]
        elif sum(counts) > limit:
            owners = [i for i, n in enumerate(counts) for _ in range(n)]
            drawn = random.Random(step_seed(self.seed, context.iteration)).sample(owners, limit)
            kept = [drawn.count(i) for i in range(len(boxes))]
        else:
            return boxes
        generator = self._generator(context, boxes[0].device)
        return [
            b if k == len(b) else b[torch.rand(len(b), device=b.device, generator=generator).topk(k).indices]
            for b, k in zip(boxes, kept, strict=True)
        ]

    def _class(self, student: list[Tensor], teacher: list[Tensor], context: Context) -> list[list[Examples]]:
        labels, levels = self._labels(context), []
        for s, t in zip(student, teacher, strict=True):
            (ours, valid), (theirs, _) = (class_tokens(x, labels, self.num_classes) for x in (s, match_size(t, s)))
            levels.append(self._sets(ours, theirs, valid, context))
        return levels

    def _labels(self, context: Context) -> Tensor:
        """The label map with no class where a pixel is ignored: the index of ignored pixels may be that of a class."""
        labels = context.label_map
        return torch.where(labels == context.ignore_index, self.num_classes, labels)

    def _grid(self, student: list[Tensor], teacher: list[Tensor], context: Context) -> list[list[Examples]]:
        levels = []
        for s, t in zip(student, teacher, strict=True):
            mask = context.mask(s.shape[2:]) if self.use_mask else None
            (ours, valid), (theirs, _) = (grid_tokens(x, self.grid, mask) for x in (s, match_size(t, s)))
            levels.append(self._sets(ours, theirs, valid, context))
        return levels

    def _image(self, student: list[Tensor], teacher: list[Tensor], context: Context) -> list[list[Examples]]:
        levels = []
        for s, t in zip(student, teacher, strict=True):
            found = []
            for x in (as_map(s), as_map(t)):
                # tokens and vectors have no known place in the image
                mask = context.mask(x.shape[2:]) if self.use_mask and x.shape[3] > 1 else None
                found.append(image_tokens(x, mask))
            (ours, first), (theirs, second) = found
            both = (first & second).to(ours.dtype)
            ours, theirs, both = (gather_processes(x)[None] for x in (ours, theirs, both))
            levels.append(self._sets(ours, theirs, both > 0, context, alike=True))
        return levels

    def _sets(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None, context: Context, alike: bool = False
    ) -> list[Examples]:
        """``[B, N, d]`` of both sides and boolean ``[B, N]`` -> sets of at most ``max_examples``.

        Args:
            alike: the examples are those of all processes, which have to choose the same ones.
        """
        if not self.per_image:
            student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
            valid = None if valid is None else valid.flatten()[None]
        generator = None
        sets = []
        for s, t, v in zip(student, teacher, [None] * len(student) if valid is None else valid, strict=True):
            if len(s) > self.max_examples:
                generator = generator or self._generator(context, s.device, alike)
                chance = torch.rand(len(s), device=s.device, generator=generator)
                chosen = (chance if v is None else chance.where(v, -1.0)).topk(self.max_examples).indices
                s, t, v = s[chosen], t[chosen], None if v is None else v[chosen]
            sets.append(Examples(s, t, v))
        return sets

    def _generator(self, context: Context, device: torch.device, alike: bool = False) -> torch.Generator:
        return torch.Generator(device).manual_seed(step_seed(self.seed, context.iteration, alike))


def _has_relations(examples: Examples) -> Tensor:
    """Boolean scalar."""
    s, _, valid = examples
    return torch.full((), len(s) >= LEAST, device=s.device) if valid is None else valid.sum() >= LEAST


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what every process sends back to it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_processes(x: Tensor) -> Tensor:
    """``[B, d]`` of this process -> ``[processes * B, d]``, with gradient; equal ``B`` everywhere.

    Every process has the same loss then, and the mean of their gradients, which distributed training takes, is that of
    one process with all images.
    """
    return _Gather.apply(x) if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else x
