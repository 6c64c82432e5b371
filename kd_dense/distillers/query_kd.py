"""Distillation between the matched queries of two detection transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd_dense.connectors import build_connector, joins_levels, match_size
from kd_dense.context import Context
from kd_dense.description import Probe, Queries
from kd_dense.distillers.base import Distiller, TapPair, describe, matched_levels, octaves
from kd_dense.distillers.cwd import not_negative, positive
from kd_dense.errors import ConfigError
from kd_dense.geometry.matching import assign, pair_costs
from kd_dense.losses import mse
from kd_dense.losses.queries import foreground, query_class_kl, query_giou, query_l1
from kd_dense.losses.reduction import at_least_fp32
from kd_dense.registry import DISTILLERS

#: Which decoder layers are compared.
LAYERS = ('last', 'all')


@DISTILLERS.register_module()
class QueryKD(Distiller):
    """Each query of the teacher teaches the student's query that predicts the most similar object.

    Queries have no order that two models share, so they are matched anew in each image and step: with ``f_j`` the
    teacher's foreground score (largest class score with sigmoid heads, ``1 - p(background)`` with softmax heads), the
    Hungarian algorithm finds the one-to-one assignment ``i(j)`` that minimises

    ``sum_j f_j (class_weight CE(p_j, q_i) + l1_weight |b_i - b_j|_1 + giou_weight (1 - GIoU(b_i, b_j)))``

    and on the matched pairs, per expected object ``N = max(1, sum f_j)`` of the batch,

    * ``class_loss = class_weight T^2 sum_j (f_j + negative_weight (1 - f_j)) KL(p_j || q_i) / N``
    * ``l1_loss = l1_weight sum_j f_j |b_i - b_j|_1 / N``
    * ``giou_loss = giou_weight sum_j f_j (1 - GIoU(b_i, b_j)) / N``
    * ``memory_loss = memory_weight * mean over levels of MSE(connector(M_S), M_T)``, with ``M`` the encoder's output
      laid out as maps, padding masked; levels go together by stride, and a teacher may have more of them.

    Numbers of queries may differ: the teacher's ``min(teacher_queries, Q_S, Q_T)`` most confident of each image take
    part, and queries of the student that are left over are taught nothing (its own loss makes them background).
    Denoising queries of the student's training forward (DINO) have no counterpart and are left out. No ground truth is
    used.

    Sources: Chang et al., "DETRDistill", ICCV 2023. Its released code (Deformable DETR, sigmoid) is this with
    ``f_j = 1`` everywhere, cross-entropy in place of the KL (equal gradients), weights 1, 5 and 2, no temperature, all
    decoder layers (layer i with layer i, summed), positive and negative queries alike, and a sum per matched pair. The
    paper's own account of positive and negative predictions is UNCONFIRMED, and its target-aware features and
    query-prior assignment are not part of this method. Weighting every query by the teacher's largest class score is
    KD-DETR's (Wang et al., CVPR 2024), for equal queries fed to both models; read in a copy of its code that is not the
    authors', so UNCONFIRMED. Our choices: that weight in the assignment too, the divisor, the mean over layers, the
    memory term and its weight, and who takes part where the numbers of queries differ.

    The assignment is solved on the host: one copy of the costs of all images and layers to it, and one back. That is
    the one exception to the rule that a step copies nothing to the host, see :mod:`kd_dense.geometry.matching`. It
    takes time that grows with the cube of the number of queries: on one core, for each image and layer, about 3 ms for
    the most confident 300 of DINO's 900, which is as many as DINO reports, and 90 ms for all of them.

    Args:
        class_weight, l1_weight, giou_weight: of the losses and of the costs; 0 leaves a term out.
        memory_weight: of the encoder's memory; 0 for none, where the encoders have no levels in common.
        temperature: ``T`` > 0 of the class loss.
        negative_weight: >= 0, what a query without any object weighs in the class loss; 1 as for a certain object.
        layers: ``'last'``, or ``'all'``: layer i with layer i where both have as many, else with the teacher's layer
            at the same share of its depth.
        teacher_queries: how many of the teacher's queries at most; ``None``: all, as far as the student has as many.
        connector: of the memory, one for each level; default a 1x1 convolution where the widths differ.
        use_mask: leave padding out of the memory loss.
    """

    def __init__(
        self,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        memory_weight: float = 1.0,
        temperature: float = 1.0,
        negative_weight: float = 1.0,
        layers: str = 'last',
        teacher_queries: int | None = 300,
        connector: Mapping | str | None = None,
        use_mask: bool = True,
    ) -> None:
        super().__init__()
        self.class_weight, self.l1_weight, self.giou_weight, self.memory_weight, self.negative_weight = (
            not_negative(value, name)
            for name, value in (
                ('class_weight', class_weight),
                ('l1_weight', l1_weight),
                ('giou_weight', giou_weight),
                ('memory_weight', memory_weight),
                ('negative_weight', negative_weight),
            )
        )
        self.weights = self.class_weight, self.l1_weight, self.giou_weight
        if not any(self.weights) and not self.memory_weight:
            raise ConfigError('class_weight, l1_weight, giou_weight and memory_weight are all 0; give one of them more')
        if layers not in LAYERS:
            raise ConfigError(f'layers must be one of {", ".join(map(repr, LAYERS))}, not {layers!r}')
        if teacher_queries is not None and (not isinstance(teacher_queries, int) or teacher_queries < 1):
            raise ConfigError(f'teacher_queries must be None or a whole number >= 1, not {teacher_queries!r}')
        if joins_levels(connector, 'connector'):
            raise ConfigError('connector: the memory needs one for each level, not one that joins levels')
        self.temperature = positive(temperature, 'temperature')
        self.layers, self.teacher_queries, self.use_mask = layers, teacher_queries, use_mask
        self.taps = {}
        if any(self.weights):
            self.taps |= {'logits': TapPair.parse('query_logits'), 'boxes': TapPair.parse('query_boxes')}
        if self.memory_weight:
            # Two roles of one side each: the levels say how to unfold the memory, so none of them may be left out.
            self.taps |= {
                'memory': TapPair.parse('encoder_memory'),
                'student_levels': TapPair(student=('encoder_levels',)),
                'teacher_levels': TapPair(teacher=('encoder_levels',)),
            }
        self._connector = connector
        self.connectors = nn.ModuleList()

    # -- building ------------------------------------------------------------------------------------------------------

    def setup(self, student: Probe, teacher: Probe) -> None:
        for side, probe in (('student', student), ('teacher', teacher)):
            if isinstance(probe.queries, str):
                raise ConfigError(f'QueryKD can not read the queries of the {side}: {probe.queries}')
        if any(self.weights):
            self._setup_queries(student, teacher)
        if self.memory_weight:
            self._setup_memory(student, teacher)

    def _setup_queries(self, student: Probe, teacher: Probe) -> None:
        s, t = student.queries, teacher.queries
        if (s.num_classes, s.activation) != (t.num_classes, t.activation):
            raise ConfigError(
                f'QueryKD needs equal class predictions: the student has {s.num_classes} classes ({s.activation}), the '
                f'teacher {t.num_classes} ({t.activation}); choose a teacher with the same kind of head and the same '
                'classes, or distil the memory alone with class_weight=0, l1_weight=0 and giou_weight=0'
            )
        depths = [_depth(side, probe) for side, probe in (('student', student), ('teacher', teacher))]
        self._counts, self.activation = (s.count, t.count), s.activation
        if self.layers == 'last':
            self.pairs = [(depths[0] - 1, depths[1] - 1)]
        else:
            # the last with the last, the others at the same share of the depth, rounded up
            self.pairs = [(i, -(-(i + 1) * depths[1] // depths[0]) - 1) for i in range(depths[0])]

    def _setup_memory(self, student: Probe, teacher: Probe) -> None:
        s, t = (_memory_levels(side, probe) for side, probe in (('student', student), ('teacher', teacher)))
        order = matched_levels(s, t, 'memory') or list(range(len(t.shapes['memory'])))
        ours, theirs = octaves(s, 'memory'), octaves(t, 'memory')
        if ours != [theirs[i] for i in order]:
            raise ConfigError(
                f"memory: the levels of the encoders do not go together by stride, the student's being "
                f"{describe(s, 'memory')} and the teacher's {describe(t, 'memory')}; choose a teacher with the "
                "student's levels, or memory_weight=0"
            )
        self._order = order
        for level, index in enumerate(order):
            widths = s.shapes['memory'][level][1], t.shapes['memory'][index][1]
            self.connectors.append(build_connector(self._connector, *widths, 'connector'))

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = self._query_losses(student, teacher) if any(self.weights) else {}
        if self.memory_weight:
            losses['memory_loss'] = self.memory_weight * self._memory_loss(student, teacher, context)
        return losses

    def _query_losses(self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        sides = zip(*self.pairs, strict=True)
        (s_logits, s_boxes), (t_logits, t_boxes) = (
            [_layers(values[role][0], indices, count) for role in ('logits', 'boxes')]
            for values, indices, count in zip((student, teacher), sides, self._counts, strict=True)
        )
        with torch.no_grad(), torch.autocast(s_logits.device.type, enabled=False):
            scores = foreground(t_logits, self.activation)
            limit = min(s_logits.shape[2], scores.shape[2], self.teacher_queries or scores.shape[2])
            if limit < scores.shape[2]:
                scores, kept = scores.topk(limit, dim=2)
                t_logits, t_boxes = take(t_logits, kept), take(t_boxes, kept)
            layers = zip(s_logits, s_boxes, t_logits, t_boxes, scores, strict=True)
            costs = [pair_costs((sl, sb), (tl, tb), f, self.activation, self.weights) for sl, sb, tl, tb, f in layers]
            matched = assign(torch.stack(costs))
        losses = {}
        if self.class_weight:
            kl = query_class_kl(
                take(s_logits, matched), t_logits, scores, self.activation, self.temperature, self.negative_weight
            )
            losses['class_loss'] = self.class_weight * kl
        s_boxes = take(s_boxes, matched)
        if self.l1_weight:
            losses['l1_loss'] = self.l1_weight * query_l1(s_boxes, t_boxes, scores)
        if self.giou_weight:
            losses['giou_loss'] = self.giou_weight * query_giou(s_boxes, t_boxes, scores)
        return losses

    def _memory_loss(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> Tensor:
        ours = as_maps(student['memory'][0], student['student_levels'])
        theirs = as_maps(teacher['memory'][0], teacher['teacher_levels'])
        losses = []
        for s, index, connector in zip(ours, self._order, self.connectors, strict=True):
            s = connector(s)
            mask = context.mask(s.shape[2:]) if self.use_mask else None
            losses.append(mse(s, match_size(theirs[index], s), mask))
        return sum(losses) / len(losses)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """``[L, B, Q, K]`` at ``[L, B, n]`` -> ``[L, B, n, K]``."""
    return values.gather(2, indices[..., None].expand(*indices.shape, values.shape[3]))


def as_maps(memory: Tensor, levels: list[Tensor]) -> list[Tensor]:
    """``[B, N, C]`` of levels ``[B, *, h, w]``, whose cells follow each other -> ``[B, C, h, w]`` of each level."""
    sizes = [level.shape[2:] for level in levels]
    parts = memory.split([h * w for h, w in sizes], dim=1)
    return [part.transpose(1, 2).unflatten(2, tuple(size)) for part, size in zip(parts, sizes, strict=True)]


def _layers(values: Tensor, indices: tuple[int, ...], count: int) -> Tensor:
    """Some decoder layers of ``[L, B, Q', K]`` or of one layer ``[B, Q', K]``, the last ``count`` queries of each."""
    values = values if values.dim() == 4 else values[None]
    values = values[:, :, max(values.shape[2] - count, 0) :]
    if indices != tuple(range(len(values))):
        values = torch.stack([values[i] for i in indices])
    return at_least_fp32(values)


def _depth(side: str, probe: Probe) -> int:
    """Decoder layers of one side; :class:`ConfigError` if its tensors are no predictions of a set."""
    queries: Queries = probe.queries
    logits, boxes = (tuple(probe.shapes[role][0]) for role in ('logits', 'boxes'))
    channels = queries.num_classes + (queries.activation == 'softmax')
    if len(logits) not in (3, 4) or logits[:-1] != boxes[:-1] or (logits[-1], boxes[-1]) != (channels, 4):
        raise ConfigError(
            f'taps: class logits {list(logits)} and boxes {list(boxes)} of the {side} are no queries with {channels} '
            f'class channels ({queries.activation}) and a box each'
        )
    return logits[0] if len(logits) == 4 else 1


def _memory_levels(side: str, probe: Probe) -> Probe:
    """``probe`` with the encoder's memory as one map for each level, under the role ``memory``."""
    levels, memory = probe.shapes[f'{side}_levels'], tuple(probe.shapes['memory'][0])
    cells = [shape[2] * shape[3] for shape in levels if len(shape) == 4]
    if len(memory) != 3 or len(cells) != len(levels) or sum(cells) != memory[1]:
        raise ConfigError(
            f'memory: the {side} gives {describe(probe, "memory")}, which is not made of the cells of its levels '
            f'({describe(probe, f"{side}_levels")}); set memory_weight=0'
        )
    maps = [torch.Size((memory[0], memory[2], *shape[2:])) for shape in levels]
    return replace(probe, shapes={'memory': maps}, names={'memory': probe.names['memory']})
