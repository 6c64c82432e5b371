"""Localisation distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_dense.context import Context
from kd_dense.description import Boxes, Logits, Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe, paired_shapes
from kd_dense.distillers.cwd import positive
from kd_dense.errors import ConfigError
from kd_dense.geometry.dense_boxes import anchors_of, corners, grid_anchors
from kd_dense.geometry.localization_regions import localization_regions
from kd_dense.losses import box_l1, distribution_kl, giou_distance
from kd_dense.losses.reduction import at_least_fp32, zero_outside
from kd_dense.registry import DISTILLERS

FORMS = ('auto', 'distribution', 'iou', 'l1')
REGIONS = ('boxes', 'all')
SCORES = ('student', 'teacher', 'none')
REDUCTIONS = ('mean', 'sum')
_EPS = 1e-6


@DISTILLERS.register_module()
class LocalizationKD(Distiller):
    """Make the student's boxes equal to the teacher's, place by place, where localisation is learned.

    ``L = main * M(w, d) + valuable * M(v, d)`` over the places, anchors of cells of all levels, with ``M(w, d) =
    sum w d / sum w``. The distance ``d`` of two boxes is, by ``form``:

    * ``'distribution'``: ``T^2 / 4 * sum over the sides of KL(p_T || p_S)`` for heads that predict a distribution of
      each side (GFL and its kin; YOLO with ``reg_max`` > 1);
    * ``'iou'``: ``1 - GIoU`` of the decoded boxes, for every other head, and for any two heads that measure boxes from
      the same places;
    * ``'l1'``: mean absolute difference of the deltas where both heads predict those of equal anchors, else of the
      corners in strides.

    ``w`` is the main region: the positives of ATSS times the largest class probability that the student (``scores``)
    sees there. ``v`` is the valuable region: places whose DIoU with a box is below the box's threshold but not below a
    quarter of it, times their IoU. See :func:`~kd_dense.geometry.localization_regions.localization_regions`.

    Source: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, and the authors' code:
    ``T = 10``, a quarter of the threshold, main region weighted by the student's score, valuable one by the IoU.
    Confirmed there: both regions are sums over the places of all images, not means, of KL averaged over the bins, over
    4 sides in the main region and with a further factor 1/4 in the valuable one, each times 0.25. That is
    ``reduction='sum', loss_weight=0.25``; its size grows with the objects in a batch, so that it depends on the batch
    size and, with YOLO, is multiplied by it again.

    Ours: ``reduction='mean'``, whose size depends on neither the batch size nor the number of bins, over which KL is
    summed, and the default weights for it; the forms for other heads (Yang et al., "Bridging Cross-task Protocol
    Inconsistency for Distillation in Dense Object Detection", ICCV 2023, also compare decoded boxes by an IoU; that we
    agree in more than the idea is UNCONFIRMED); the same regions for heads with other assigners than ATSS, from the
    head's own anchors or, where it has none, from squares of ``anchor_size`` strides; DIoU as it is defined, where the
    authors' code divides the intersection by the area of the anchor instead of the union.

    Args:
        taps: ``'boxes'``: the adapter knows how to read them; ``'boxes_one2one'`` for the second branch of YOLO26.
        form: one of ``'auto'``, ``'distribution'``, ``'iou'``, ``'l1'``; ``'auto'`` is the first that both heads allow
            of ``'distribution'`` and ``'iou'``.
        temperature: ``T`` > 0 of the distributions.
        main, valuable: weights of the regions, >= 0.
        region: ``'boxes'``: the above; ``'all'``: the main region is every place, and there is no valuable one. With
            ``scores='teacher'`` it is where the teacher sees something; no ground truth is needed.
        scores: whose class probability weighs the main region, ``'student'``, ``'teacher'`` or ``'none'``.
        score_taps: class logits of the levels of ``taps``; not read with ``scores='none'``.
        reduction: ``'mean'``, or ``'sum'`` as the authors' code sums, see above.
        anchor_size: side in strides of the anchors by which the regions are found, for heads without anchors.
        nearest: cells of each level from which ATSS chooses, for every box.
        valuable_share: lower end of the valuable region relative to its upper end, 0..1.
        use_mask: leave padding out.
    """

    def __init__(
        self,
        taps: TapConfig = 'boxes',
        form: str = 'auto',
        temperature: float = 10.0,
        main: float = 1.0,
        valuable: float = 1.0,
        region: str = 'boxes',
        scores: str = 'student',
        score_taps: TapConfig = 'logits',
        reduction: str = 'mean',
        anchor_size: float = 8.0,
        nearest: int = 9,
        valuable_share: float = 0.25,
        use_mask: bool = True,
    ) -> None:
        super().__init__()
        _one_of(form, FORMS, 'form')
        _one_of(region, REGIONS, 'region')
        _one_of(scores, SCORES, 'scores')
        _one_of(reduction, REDUCTIONS, 'reduction')
        if min(main, valuable) < 0 or main + (valuable if region == 'boxes' else 0) <= 0:
            raise ConfigError(f'main and valuable must be >= 0 and not both 0, not {main!r} and {valuable!r}')
        if not isinstance(nearest, int) or nearest < 1 or not 0 <= valuable_share <= 1:
            given = f'{nearest!r} and {valuable_share!r}'
            raise ConfigError(f'nearest must be a whole number >= 1 and valuable_share in 0..1, not {given}')
        self.taps = {'boxes': TapPair.parse(taps)}
        if scores != 'none':
            both = TapPair.parse(score_taps)
            # the teacher's side alone would not be matched to the student's levels
            self.taps['scores'] = both if scores == 'teacher' else TapPair(student=both.student)
        self.form, self.temperature = form, positive(temperature, 'temperature')
        self.main, self.valuable = float(main), float(valuable)
        self.region, self.scores, self.reduction = region, scores, reduction
        self.needs_boxes = region == 'boxes'
        self.anchor_size, self.nearest = positive(anchor_size, 'anchor_size'), nearest
        self.valuable_share, self.use_mask = float(valuable_share), use_mask
        self._nothing: Tensor | None = None

    # -- building ------------------------------------------------------------------------------------------------------

    def setup(self, student: Probe, teacher: Probe) -> None:
        for side, probe in (('student', student), ('teacher', teacher)):
            if isinstance(probe.boxes, str):
                raise ConfigError(f'LocalizationKD can not read the boxes of the {side}: {probe.boxes}')
        self.boxes = {'student': student.boxes, 'teacher': teacher.boxes}
        self.form = self._form(student.boxes, teacher.boxes)
        pairs = paired_shapes(student, teacher, 'boxes')
        self.levels = self._levels(student, teacher)
        self.same_deltas = (
            _code(student.boxes) == _code(teacher.boxes) == ('delta', student.boxes.means, student.boxes.stds)
        )
        for i, (s, t) in enumerate(pairs):
            if s[2:] != t[2:]:
                raise ConfigError(
                    f'LocalizationKD compares boxes cell by cell, but {describe(student, "boxes")} (student) and '
                    f'{describe(teacher, "boxes")} (teacher) have other cells; leave teacher.scale at 1'
                )
            self._add_anchors(i, s[1], t[1])
        self.logits = None
        if self.scores != 'none':
            probe = student if self.scores == 'student' else teacher
            self.logits = self._readable(probe, [s[1] // _values(student.boxes) for s, _ in pairs])

    def _form(self, student: Boxes, teacher: Boxes) -> str:
        kinds = student.kind, teacher.kind
        if self.form != 'auto' and self.form != 'distribution':
            return self.form
        if kinds == ('distribution', 'distribution'):
            if student.bins != teacher.bins:
                raise ConfigError(
                    f'LocalizationKD compares distributions of equal bins, but the student has {student.bins} and the '
                    f"teacher {teacher.bins}; give the student the teacher's reg_max, or form='iou' to compare the "
                    'boxes that they stand for'
                )
            return 'distribution'
        if self.form == 'distribution':
            side = 'student' if kinds[0] != 'distribution' else 'teacher'
            raise ConfigError(
                f"form='distribution' needs heads that predict a distribution of each side; the {side}'s does not; "
                "choose form='iou'"
            )
        return 'iou'

    def _levels(self, student: Probe, teacher: Probe) -> dict[str, list[int]]:
        """Side -> which level of its head each tapped one is."""
        ours, theirs = student.boxes.strides, teacher.boxes.strides
        measured = student.strides('boxes')
        levels = list(range(len(ours)))
        if len(measured) != len(ours):  # a choice of them
            levels = [min(levels, key=lambda i, m=m: abs(math.log(ours[i] / m))) for m in measured]
        lacking = [ours[i] for i in levels if ours[i] not in theirs]
        if lacking:
            raise ConfigError(
                f'LocalizationKD: the teacher predicts boxes at the strides {_listed(theirs)}, and not at '
                f"{_listed(lacking)} as the student does; tap levels of equal stride, for example 'boxes:INDEX'"
            )
        return {'student': levels, 'teacher': [theirs.index(ours[i]) for i in levels]}

    def _add_anchors(self, i: int, student: int, teacher: int) -> None:
        """Check the anchors of a level from its channels on both sides, and keep those that are needed."""
        found = {}
        for side, channels in (('student', student), ('teacher', teacher)):
            boxes, level = self.boxes[side], self.levels[side][i]
            anchors = anchors_of(boxes, level, size=1.0)
            if channels != len(anchors) * _values(boxes):
                raise ConfigError(
                    f'taps: {channels} channels of the {side} are not the {_values(boxes)} numbers of a box for each '
                    f"of {len(anchors)} anchors per cell; tap 'boxes'"
                )
            found[side] = anchors
        ours, theirs = found['student'], found['teacher']
        if len(ours) != len(theirs) or (len(ours) > 1 and not torch.allclose(ours, theirs, atol=1e-3)):
            stride = self.boxes['student'].strides[self.levels['student'][i]]
            raise ConfigError(
                f'LocalizationKD compares boxes anchor by anchor, but the student has {len(ours)} and the teacher '
                f'{len(theirs)} per cell at stride {stride:g}, or they differ in shape; choose a teacher with the same '
                'anchors, or distil features instead'
            )
        self.same_deltas = self.same_deltas and torch.allclose(ours, theirs, atol=1e-3)
        # not a part of the distillation state: the config says what they are
        self.register_buffer(f'student_{i}', ours, persistent=False)
        self.register_buffer(f'teacher_{i}', theirs, persistent=False)
        around = anchors_of(self.boxes['student'], self.levels['student'][i], self.anchor_size)
        self.register_buffer(f'region_{i}', around, persistent=False)

    def _readable(self, probe: Probe, anchors: list[int]) -> Logits:
        """How to read the class logits of the side that gives the scores."""
        logits = probe.logits
        instead = "give scores='none', or the other side's"
        if isinstance(logits, str):
            raise ConfigError(
                f'LocalizationKD can not weigh by the class scores of the {self.scores}: {logits}; {instead}'
            )
        channels = [shape[1] for shape in probe.shapes['scores']]
        if logits.layout != 'map' or channels != [a * logits.num_classes for a in anchors]:
            raise ConfigError(
                f'score_taps: the class logits of the {self.scores} ({describe(probe, "scores")}) are not those of its '
                f'{len(anchors)} levels of boxes with {logits.num_classes} classes; {instead}'
            )
        return logits

    # -- one step ------------------------------------------------------------------------------------------------------

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        sizes = [(s.shape[2], s.shape[3]) for s in student['boxes']]
        with torch.no_grad():
            parts = self._weights(student, teacher, context, sizes)
        totals = [[0.0, 0.0] for _ in parts]
        for i, (s, t) in enumerate(zip(student['boxes'], teacher['boxes'], strict=True)):
            weights = [part[i] for _, part in parts]
            distance = self._distance(i, s, t, sum(weights) > 0, sizes[i])
            for total, weight in zip(totals, weights, strict=True):
                total[0] = total[0] + (weight * distance).sum()
                total[1] = total[1] + weight.sum()
        self._nothing = sum(weight for _, weight in totals) == 0  # boxes too small for either region, say
        return {'loss': sum(factor * self._reduced(*total) for (factor, _), total in zip(parts, totals, strict=True))}

    def compared_nothing(self) -> Tensor | None:
        return self._nothing

    def _reduced(self, total: Tensor, weight: Tensor) -> Tensor:
        if self.reduction == 'mean':
            return total / weight.clamp(min=_EPS)
        return total / self.boxes['student'].bins if self.form == 'distribution' else total

    def _distance(self, i: int, s: Tensor, t: Tensor, counts: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, A, P]`` of level ``i``; 0, or a constant, where ``counts`` is false."""
        sides = {'student': s, 'teacher': t.detach()}
        for side, x in sides.items():
            # [B, A * V, h, w] -> [B, A, V, P], V split into sides and bins where there are any
            x = x.flatten(2).unflatten(1, (counts.shape[1], _values(self.boxes[side])))
            # before all else, so that nothing that is not finite outside the regions gets into a gradient
            x = at_least_fp32(zero_outside(x, counts[:, :, None]))
            if self.boxes[side].kind == 'distribution':
                x = x.unflatten(2, (4, self.boxes[side].bins))
            sides[side] = x
        if self.form == 'distribution':
            return distribution_kl(*sides.values(), self.temperature)
        if self.form == 'iou' or not self.same_deltas:
            for side, x in sides.items():
                anchors = getattr(self, f'{side}_{i}')
                sides[side] = corners(x, self.boxes[side], self.levels[side][i], anchors, size)
        return (giou_distance if self.form == 'iou' else box_l1)(*sides.values())

    def _weights(
        self,
        student: dict[str, list[Tensor]],
        teacher: dict[str, list[Tensor]],
        context: Context,
        sizes: list[tuple[int, int]],
    ) -> list[tuple[float, list[Tensor]]]:
        """The factor of each region that counts, and its weights ``[B, A, P]`` of each level."""
        batch = len(student['boxes'][0])
        masks = [context.mask(size) if self.use_mask else None for size in sizes]
        if self.region == 'all':
            main = [
                self._everywhere(i, batch, size, mask) for i, (size, mask) in enumerate(zip(sizes, masks, strict=True))
            ]
            valuable = None
        else:
            main, valuable = self._regions(context, sizes, masks)
        if self.logits is not None:
            scores = (student if self.scores == 'student' else teacher)['scores']
            main = [m * _probability(x, self.logits, m.shape[1]) for m, x in zip(main, scores, strict=True)]
        # 1/4: the authors divide by 16 in the valuable region where they divide by 4 in the main one
        factor = self.valuable / 4 if self.reduction == 'sum' else self.valuable
        return [(w, part) for w, part in ((self.main, main), (factor, valuable)) if w and part is not None]

    def _everywhere(self, i: int, batch: int, size: tuple[int, int], mask: Tensor | None) -> Tensor:
        anchors = getattr(self, f'region_{i}')
        if mask is None:
            return anchors.new_ones(batch, len(anchors), size[0] * size[1])
        return mask.flatten(2).expand(-1, len(anchors), -1).to(anchors.dtype)

    def _regions(
        self, context: Context, sizes: list[tuple[int, int]], masks: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if context.boxes is None:
            raise ConfigError("region='boxes' needs ground-truth boxes, which this task has not; give region='all'")
        strides = [self.boxes['student'].strides[i] for i in self.levels['student']]
        levels = [
            grid_anchors(getattr(self, f'region_{i}'), stride, size)
            for i, (stride, size) in enumerate(zip(strides, sizes, strict=True))
        ]
        valid = None if masks[0] is None else torch.cat([mask.flatten(1) for mask in masks], 1)
        images = [
            localization_regions(levels, boxes, None if valid is None else valid[i], self.nearest, self.valuable_share)
            for i, boxes in enumerate(context.boxes)
        ]
        return tuple(_by_level(torch.stack(part), levels) for part in zip(*images, strict=True))


def _by_level(weights: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """``[B, N]``, level by level and cell by cell -> of each level ``[B, A, P]``."""
    parts = weights.split([level.shape[0] * level.shape[1] for level in levels], 1)
    return [part.unflatten(1, level.shape[:2]).transpose(1, 2) for part, level in zip(parts, levels, strict=True)]


def _probability(x: Tensor, logits: Logits, anchors: int) -> Tensor:
    """Largest class probability of each anchor: ``[B, A * C, h, w] -> [B, A, P]``."""
    x = at_least_fp32(x.detach()).flatten(2).unflatten(1, (anchors, logits.num_classes))
    if logits.activation == 'sigmoid':
        return x.amax(2).sigmoid()
    return x.softmax(2)[:, :, :-1].amax(2)  # the last class of MMDetection's softmax heads is the background


def _values(boxes: Boxes) -> int:
    """Channels for each box."""
    return 4 * boxes.bins if boxes.kind == 'distribution' else 4


def _code(boxes: Boxes) -> tuple:
    return boxes.kind, boxes.means, boxes.stds


def _listed(strides: list[float] | tuple[float, ...]) -> str:
    return ', '.join(f'{s:g}' for s in strides)


def _one_of(value: str, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise ConfigError(f'{name} must be one of {list(known)}, not {value!r}')
