"""Numbers in 256 levels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """256 levels for each channel, evenly from its smallest to its largest number.

    ``q = round((x - low) / step)`` with ``step = (high - low) / 255``. Not symmetric around zero: behind a ReLU, and in
    class logits of rare objects, half of the levels would stay empty. Nothing is cut off; where single numbers are far
    from all others, the others get few levels. The choice is ours.

    Args:
        tensor: a map ``[C, h, w]``, or tokens ``[..., C]``.

    Returns:
        ``q`` in uint8, in the shape of ``tensor``; ``low`` and ``step``, fp32, ``[2, C, 1, 1]`` or ``[2, 1, ..., C]``.
    """
    x = tensor.float()
    positions = (1, 2) if x.dim() == 3 else tuple(range(x.dim() - 1))
    low, high = x.amin(positions, keepdim=True), x.amax(positions, keepdim=True)
    step = (high - low) / 255
    levels = ((x - low) / step.clamp(min=torch.finfo(step.dtype).tiny)).round_()
    return levels.to(torch.uint8), torch.stack([low, step])


def from_int8(levels: Tensor, scale: Tensor) -> Tensor:
    """``low + q * step``, fp32, of what :func:`to_int8` returned."""
    return torch.addcmul(scale[0], levels, scale[1])
