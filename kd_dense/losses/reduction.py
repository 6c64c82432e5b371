"""What every loss does before and after its formula: precision, constants, masks."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def prepare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32 or better, the teacher as a constant."""
    return at_least_fp32(student), at_least_fp32(teacher.detach())


def zero_outside(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with 0 where ``mask`` (broadcast to it) is false.

    A selection, not a product: what is not finite outside the mask leaves no NaN in the value nor in the gradient. For
    the gradient this has to come before the first operation that could make one: 0 times the derivative there is NaN.
    """
    return x if mask is None else torch.where(mask, x, x.new_zeros(()))


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` over the positions where ``mask`` (broadcast to it) is true; 0 when there are none."""
    if mask is None:
        return values.mean()
    mask = mask.expand_as(values)
    return zero_outside(values, mask).sum() / mask.sum().clamp(min=1)
