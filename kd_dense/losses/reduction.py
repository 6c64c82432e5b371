"""What every loss does before and after its formula: precision, constants, masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    return values.mean() if mask is None else zero_outside(values, mask).sum() / count_of(values, mask)


def count_of(x: Tensor, mask: Tensor | None, dims: Sequence[int] | None = None) -> Tensor | int:
    """How many entries of ``x`` lie inside ``mask`` (broadcast to it), at least 1.

    Args:
        dims: those that are counted over, which stay with size 1; default: all, and none stays.
    """
    over = tuple(range(x.ndim) if dims is None else dims)
    if mask is None:
        return math.prod(x.shape[d] for d in over)
    mask = mask[(None,) * (x.ndim - mask.ndim)]
    # The mask is counted as it is: what it is broadcast to may have hundreds of times as many entries.
    copies = math.prod(x.shape[d] // mask.shape[d] for d in over)
    return (mask.sum(over, keepdim=dims is not None) * copies).clamp(min=1)
