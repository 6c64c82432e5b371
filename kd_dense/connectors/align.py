"""The one rule by which tensors of different layout or size are brought together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_dense.errors import ConfigError


def as_map(x: Tensor) -> Tensor:
    """View any tapped tensor as a map ``[B, C, h, w]``.

    Tokens ``[B, N, C]`` become ``[B, C, N, 1]``, vectors ``[B, C]`` become ``[B, C, 1, 1]``; maps stay as they are.
    """
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        return x.transpose(1, 2)[..., None]
    if x.dim() == 2:
        return x[..., None, None]
    raise ConfigError(f'a tapped tensor must have 2, 3 or 4 dimensions, not the shape {tuple(x.shape)}')


def match_size(teacher: Tensor, student: Tensor) -> Tensor:
    """Resize the teacher's map to the student's ``(h, w)``: bilinear, corners not aligned.

    The teacher is resized, not the student, because no gradient has to flow through it.

    Args:
        teacher: ``[B, C, h_t, w_t]``.
        student: ``[B, *, h, w]``.
    """
    if teacher.shape[2:] == student.shape[2:]:
        return teacher
    return F.interpolate(teacher.float(), size=student.shape[2:], mode='bilinear', align_corners=False)
