"""Distillation of class predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_dense.connectors import match_size
from kd_dense.context import Context
from kd_dense.description import Logits, Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, paired_shapes
from kd_dense.distillers.cwd import positive
from kd_dense.errors import ConfigError
from kd_dense.losses import bernoulli_kl, class_kl
from kd_dense.registry import DISTILLERS


@DISTILLERS.register_module()
class LogitKD(Distiller):
    """KL divergence between teacher's and student's class predictions, at every position.

    Segmentation (softmax heads): ``T^2 * mean over pixels of KL(p_T || p_S)`` (Hinton et al. 2015, applied pixel by
    pixel as in Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, equation 1);
    ignored pixels and padding are masked. Detectors: the same per anchor, or per query, with a softmax head; with
    sigmoid heads the KL of independent classes, divided by the teacher's expected number of detections
    (:func:`~kd_dense.losses.bernoulli_kl`; our normalisation).

    All levels of a detector are taken together, so that an object counts the same on every level.

    Queries are compared by their index, from the last decoder layer, which has a meaning only when both models order
    them alike (equal learned queries, or a student initialised from the teacher).

    Args:
        taps: ``'logits'``: the adapter knows where they are. Other taps are read in the same layout.
        temperature: ``T`` > 0.
        use_mask: leave padding and ignored pixels out.
    """

    probabilities_only = True

    def __init__(self, taps: TapConfig = 'logits', temperature: float = 1.0, use_mask: bool = True) -> None:
        super().__init__()
        self.taps = {'logits': TapPair.parse(taps)}
        self.temperature = positive(temperature, 'temperature')
        self.use_mask = use_mask

    def setup(self, student: Probe, teacher: Probe) -> None:
        for side, probe in (('student', student), ('teacher', teacher)):
            if isinstance(probe.logits, str):
                raise ConfigError(f'LogitKD can not read the class predictions of the {side}: {probe.logits}')
        s, t = student.logits, teacher.logits
        if (s.num_classes, s.activation, s.layout) != (t.num_classes, t.activation, t.layout):
            raise ConfigError(
                f'LogitKD needs equal class predictions: the student has {_describe(s)}, the teacher {_describe(t)}; '
                'distil features instead, or choose a teacher with the same kind of head and the same classes'
            )
        for shape_s, shape_t in paired_shapes(student, teacher, 'logits'):
            channels_s, channels_t = (x[-1] if s.layout == 'query' else x[1] for x in (shape_s, shape_t))
            if channels_s != channels_t or channels_s % s.num_classes:
                raise ConfigError(
                    f'taps: class predictions of {channels_s} (student) and {channels_t} (teacher) channels do not fit '
                    f'{s.num_classes} classes per anchor on both sides'
                )
            if s.layout == 'query' and shape_s[-2] != shape_t[-2]:
                raise ConfigError(
                    f'LogitKD compares queries by index: {shape_s[-2]} (student) and {shape_t[-2]} (teacher) differ'
                )
        self.logits = s

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        levels = [self._align(s, t, context) for s, t in zip(student['logits'], teacher['logits'], strict=True)]
        s, t = (torch.cat([level[side] for level in levels], dim=2) for side in (0, 1))
        masks = [level[2] for level in levels]
        mask = None if masks[0] is None else torch.cat(masks, dim=2)
        function = class_kl if self.logits.activation == 'softmax' else bernoulli_kl
        return {'loss': function(s, t, self.temperature, mask)}

    def _align(self, s: Tensor, t: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """One level of both sides as ``[B, C, N]``, ``N`` positions times anchors, and its mask ``[B, 1, N]``."""
        if self.logits.layout == 'query':
            s, t = (x[-1] if x.dim() == 4 else x for x in (s, t))
            # Denoising queries of the training forward come first and have no counterpart in the teacher.
            s = s[:, s.shape[1] - t.shape[1] :]
            return s.transpose(1, 2), t.transpose(1, 2), None
        t = match_size(t, s)
        mask = context.mask(s.shape[2:]) if self.use_mask else None
        anchors = s.shape[1] // self.logits.num_classes
        # [B, A*C, h, w] -> [B, C, A*h*w]
        s, t = (
            x.unflatten(1, (anchors, self.logits.num_classes)).transpose(1, 2).flatten(2)
            if anchors > 1
            else x.flatten(2)
            for x in (s, t)
        )
        return s, t, mask.flatten(2).repeat(1, 1, anchors) if mask is not None else None


def _describe(logits: Logits) -> str:
    return f'{logits.num_classes} classes ({logits.activation}, {logits.layout})'
