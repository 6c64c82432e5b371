"""Feature imitation guided by the ground-truth boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size, Tensor, nn

from kd_dense.connectors import match_size
from kd_dense.connectors.global_context import GlobalContext
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import TapConfig, TapPair, describe, paired_shapes, score_branches
from kd_dense.distillers.cwd import positive
from kd_dense.distillers.feature_mimic import FeatureDistiller, mask_for
from kd_dense.errors import ConfigError, closest
from kd_dense.geometry.boxes import boxes_of, gaussian_sum, gaussian_union, gaussians, scale_mask, spans
from kd_dense.losses.focal import attention, attention_distance, weighted_squares
from kd_dense.losses.reduction import at_least_fp32, prepare, zero_outside
from kd_dense.registry import DISTILLERS

#: Weights inside the method: those of the paper for one-stage detectors with anchors.
TERMS = dict(foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6)
MASKS = ('box', 'gaussian', 'scores')


@DISTILLERS.register_module()
class BoxGuidedMimic(FeatureDistiller):
    """Imitate the teacher's FPN maps, objects and background apart, most where the teacher looks.

    For each level, ``S`` the connected student map, ``T`` the teacher's, ``x`` a cell, ``B`` images::

        A_s(F) = n softmax over cells of (mean over channels of |F|) / t         n cells that count
        A_c(F) = C softmax over channels of (mean over cells of |F|) / t
        weight(x)   = foreground W_f(x) + background W_b(x)
        L_feature   = sum_{b,c,x} weight(x) A_s(T)(x) A_c(T)(c) (S - T)^2 / B
        L_attention = attention (sum |A_s(S) - A_s(T)| + sum |A_c(S) - A_c(T)|) / B
        L_relation  = relation sum_{b,c,x} (S + R_S(S) - T - R_T(T))^2 / B

    ``W_f`` of a cell is 1 / (cells of the smallest box that covers it), so that every object weighs 1 whatever its
    size; ``W_b`` is 1 / (cells of the image's background) outside of all boxes. ``R`` are global context blocks
    (:class:`~kd_dense.connectors.global_context.GlobalContext`), trained with the student and then discarded, one for
    each side. The levels are summed.

    Source: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022 (FGD), and the authors'
    public code. Where this differs from the code:

    * boxes are brought to the grid by ``canvas / size``. The code divides by the size of the image without its padding,
      which moves the boxes of every image that is smaller than the padded batch;
    * padding counts nowhere: not in attention, background, context and sums;
    * a box covers the cells that it shares an area with; the code adds a row and a column at the bottom and the right
      (``overhang=1``);
    * the blocks' last layer begins small, not at 0.

    The errors are summed over channels and cells, as in the paper, and the weights are made for that. In the public
    configs ``foreground``, ``background``, ``attention``, ``relation`` and ``t`` are 1e-3, 5e-4, 5e-4, 5e-6 and 0.5 for
    RetinaNet and GFL; 1.6e-3, 8e-4, 8e-4, 8e-6 and 0.5 for RepPoints, 0.8 for FCOS; 5e-5, 2.5e-5, 5e-5, 5e-7 and 0.5
    for Faster and Mask R-CNN, on the four finest levels; 2e-3, 1e-3, 1e-3, 1e-5 and 0.5 for YOLOX. All but the last of
    them are for 256 channels and images of about 800 x 1333. The feature loss grows with ``C`` alone: as the weights of
    the cells sum to 1 for each object, 1e-3 on sums over 256 channels is 0.256 on means. The attention loss grows with
    ``h w`` in its spatial half and with ``C`` in the other, the relation loss with ``C h w``: images with a quarter of
    the pixels have a quarter of it. ``loss_weight='auto'`` brings the sum of all terms to a share of the task's
    gradient and keeps their proportions.

    Args:
        taps: the FPN levels.
        mask: what ``W_f`` and ``W_b`` are made of.
            ``'box'``: the boxes, as above.
            ``'gaussian'``: a bell on each box, scaled to sum to 1, summed; the background is 1 less the sum of the
            bells of height 1, at least 0, again scaled to sum to 1. Bells fall to the edge of an object instead of
            ending there. Sun et al. (arXiv 2006.13108) imitate under Gaussian masks too, whose formula is UNCONFIRMED;
            this form is ours.
            ``'scores'``: the teacher's class scores, ``m = max over classes of sigmoid(z_T)`` as in
            :class:`~kd_dense.distillers.native.Native`, in place of boxes: ``W_f = m / mean over levels of sum m``,
            together 1 for each level in the mean, and ``W_b = (1 - m) / sum (1 - m)``. Needs a teacher with a dense
            sigmoid head; images without boxes teach as well. This form is ours.
        terms: ``foreground``, ``background``, ``attention`` and ``relation`` above, each 0 to leave it out; what is not
            given is as for RetinaNet, but ``attention`` is 0 without a temperature.
        temperature: ``t``; ``None``: no attention, ``A_s = A_c = 1``.
        connector: see :class:`FeatureDistiller`; default a 1x1 convolution where the widths differ, as in the code.
        sigma: standard deviation of a bell as a share of the side of its box. Our choice.
        overhang: cells added to each box at its right and bottom.
        scores: the teacher's class logits, for ``mask='scores'``.
        use_mask: leave padding out.
    """

    needs_boxes = True

    def __init__(
        self,
        taps: TapConfig = 'neck',
        mask: str = 'box',
        terms: Mapping[str, float] | None = None,
        temperature: float | None = 0.5,
        connector: Mapping | str | None = None,
        sigma: float = 0.25,
        overhang: int = 0,
        scores: str = 'branch_logits',
        use_mask: bool = True,
    ) -> None:
        super().__init__(taps, connector)
        if mask not in MASKS:
            raise ConfigError(f'mask must be one of {list(MASKS)}, not {mask!r}')
        if not isinstance(overhang, int) or overhang < 0:
            raise ConfigError(f'overhang must be a whole number of cells >= 0, not {overhang!r}')
        self.mask, self.overhang, self.use_mask = mask, overhang, use_mask
        self.temperature = None if temperature is None else positive(temperature, 'temperature')
        self.sigma = positive(sigma, 'sigma')
        self.terms = _terms(terms, attended=temperature is not None)
        self.needs_boxes = mask != 'scores' and bool(self.terms['foreground'] or self.terms['background'])
        if mask == 'scores':
            self.taps['scores'] = TapPair(teacher=(scores,))
        self.contexts, self.target_contexts = nn.ModuleList(), nn.ModuleList()

    def setup(self, student: Probe, teacher: Probe) -> None:
        shapes = paired_shapes(student, teacher, 'features')
        only_maps(shapes, student, 'BoxGuidedMimic')
        super().setup(student, teacher)
        if self.mask == 'scores':
            self._branches = score_branches(teacher, "BoxGuidedMimic with mask='scores'", "mask='box'")
        if self.terms['relation']:
            for contexts in (self.contexts, self.target_contexts):
                contexts.extend(GlobalContext(t[1]) for _, t in shapes)

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        levels = [prepare(s, t) for s, t in self.levels(student, teacher)]
        masks = [mask_for(s, context, self.use_mask) for s, _ in levels]
        weights = self._weights([s for s, _ in levels], masks, teacher, context)
        losses: dict[str, list[Tensor]] = {}
        for i, ((s, t), mask, cells) in enumerate(zip(levels, masks, weights, strict=True)):
            where = channels = None
            if self.temperature is not None:
                where, channels = attention(t, self.temperature, mask)
            difference = zero_outside(s - t, mask)
            if cells is not None:
                cells = cells if where is None else cells * where
                losses.setdefault('feature_loss', []).append(weighted_squares(difference, cells, channels))
            if self.terms['attention']:
                distance = sum(map(attention_distance, attention(s, self.temperature, mask), (where, channels)))
                losses.setdefault('attention_loss', []).append(self.terms['attention'] * distance)
            if self.terms['relation']:
                # both blocks are trained; what they add is one number for a channel, so their difference comes first
                added = self.contexts[i](s, mask) - self.target_contexts[i](t, mask)
                error = weighted_squares(zero_outside(difference + added, mask))
                losses.setdefault('relation_loss', []).append(self.terms['relation'] * error)
        return {name: sum(values) for name, values in losses.items()}

    # -- the weights of the cells --------------------------------------------------------------------------------------

    def _weights(
        self, maps: list[Tensor], masks: list[Tensor | None], teacher: dict[str, list[Tensor]], context: Context
    ) -> list[Tensor | None]:
        """``foreground W_f + background W_b`` of each level, ``[B, 1, h, w]``; ``None`` where both are left out."""
        alpha, beta = self.terms['foreground'], self.terms['background']
        if not alpha and not beta:
            return [None] * len(maps)
        if self.mask == 'scores':
            objects = self._scores(maps, masks, teacher['scores'])
        else:
            boxes, real = boxes_of(context, 'BoxGuidedMimic')
            objects = [self._objects(boxes, real, context.canvas, tuple(x.shape[2:])) for x in maps]
        weights = []
        for (foreground, share), mask in zip(objects, masks, strict=True):
            rest = zero_outside(1 - share, mask)
            background = rest / rest.sum((2, 3), keepdim=True).clamp(min=1)
            weights.append(alpha * zero_outside(foreground, mask) + beta * background)
        return weights

    def _objects(
        self, boxes: Tensor, real: Tensor, canvas: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """``W_f``, and how much of each cell belongs to objects, 0..1."""
        if self.mask == 'gaussian':
            profiles = gaussians(boxes, real, canvas, size, self.sigma)
            return gaussian_sum(*profiles), gaussian_union(*profiles)
        foreground = scale_mask(*spans(boxes, real, canvas, size, self.overhang))
        return foreground, (foreground > 0).float()

    def _scores(
        self, maps: list[Tensor], masks: list[Tensor | None], logits: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The same, from the teacher's class logits."""
        scores = []
        for x, mask, branches in zip(maps, masks, self._branches, strict=True):
            mean = sum(at_least_fp32(logits[i]) for i in branches) / len(branches)
            # anchors share a cell: the best of all of them counts
            score = match_size(mean.sigmoid().amax(1, keepdim=True), x).to(x.dtype)
            scores.append(zero_outside(score, mask))
        # over all levels at once: a level on which the teacher sees nothing shall not be blown up
        total = sum(score.sum((2, 3), keepdim=True) for score in scores) / len(scores)
        return [(score / total.clamp(min=torch.finfo(total.dtype).tiny), score) for score in scores]


def only_maps(shapes: list[tuple[Size, Size]], student: Probe, method: str) -> None:
    """Raise :class:`ConfigError` unless all levels are maps ``[B, C, h, w]``; others have no place in the image."""
    if not all(len(s) == 4 for s, _ in shapes):
        raise ConfigError(f'taps: {method} needs maps [B, C, h, w], not {describe(student, "features")}')


def _terms(given: Mapping[str, float] | None, attended: bool) -> dict[str, float]:
    for name, weight in (given or {}).items():
        if name not in TERMS:
            raise ConfigError(f'terms: there is no term {name!r}; {closest(name, TERMS)}')
        if not isinstance(weight, (int, float)) or not 0 <= weight < float('inf'):
            raise ConfigError(f'terms.{name}: must be a finite number >= 0, not {weight!r}')
    terms = {**TERMS, **({} if attended else {'attention': 0.0}), **(given or {})}
    if terms['attention'] and not attended:
        raise ConfigError('terms.attention: needs a temperature, and it is None')
    if not any(terms.values()):
        raise ConfigError('terms: at least one of them must be greater than 0')
    return terms
