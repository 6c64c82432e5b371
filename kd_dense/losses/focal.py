"""Squared errors of feature maps under weights of cells and channels, and where a map is strong.

Sums over channels and cells, and means over images: the reduction of the methods that use them. Gradients go to the
student only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_dense.losses.reduction import at_least_fp32, prepare, zero_outside


def attention(x: Tensor, temperature: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where a map is strong, and which of its channels are.

    ``n softmax over cells of (mean over channels of |x|) / T``, ``n`` cells that count, and
    ``C softmax over channels of (mean over cells of |x|) / T``. Both have the mean 1, over cells that count; the others
    get 0. An image without any cell that counts has 0 for all cells and 1 for all channels.

    Args:
        x: ``[B, C, h, w]``.
        temperature: ``T`` > 0; the higher, the more even.
        mask: boolean ``[B, 1, h, w]``, cells that count; all of them when ``None``.

    Returns:
        ``[B, 1, h, w]`` and ``[B, C, 1, 1]``.
    """
    size = zero_outside(at_least_fp32(x), mask).abs()
    cells, channels = size.mean(1, keepdim=True) / temperature, size.sum((2, 3), keepdim=True) / temperature
    if mask is None:
        n = size.shape[2] * size.shape[3]
        return n * _softmax_of_cells(cells), size.shape[1] * (channels / n).softmax(1)
    # the lowest finite number, not -inf: an image without any cell that counts must not become NaN
    cells = cells.masked_fill(~mask, torch.finfo(cells.dtype).min)
    count = mask.sum((2, 3), keepdim=True)
    channels = (channels / count.clamp(min=1)).softmax(1)
    return count * zero_outside(_softmax_of_cells(cells), mask), size.shape[1] * channels


def _softmax_of_cells(x: Tensor) -> Tensor:
    return x.flatten(1).softmax(1).view_as(x)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum |S - T| / B`` of two attentions of one kind."""
    student, teacher = prepare(student, teacher)
    return (student - teacher).abs().sum() / student.shape[0]


def squared_error(
    student: Tensor,
    teacher: Tensor,
    cells: Tensor | None = None,
    channels: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``sum_{b,c,x} cells_{b,x} channels_{b,c} (S - T)^2 / B``.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        cells: ``[B, 1, h, w]``, >= 0; a constant, like the teacher. ``None``: 1 everywhere.
        channels: ``[B, C, 1, 1]``, likewise.
        mask: boolean ``[B, 1, h, w]``, cells that count; what lies outside need not be finite.

    Returns:
        Scalar; 0 when the mask is empty or the weights are 0.
    """
    student, teacher = prepare(student, teacher)
    return weighted_squares(zero_outside(student - teacher, mask), cells, channels)


def weighted_squares(difference: Tensor, cells: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
    """``sum_{b,c,x} cells_{b,x} channels_{b,c} D^2 / B`` of a difference ``D`` ``[B, C, h, w]``.

    For several terms about one difference, which is then formed once. Keeps it for the backward and nothing else of its
    size; can be differentiated once. The weights are as for :func:`squared_error`, constants.
    """
    return _WeightedSquares.apply(difference, cells, channels) / difference.shape[0]


class _WeightedSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, difference: Tensor, cells: Tensor | None, channels: Tensor | None) -> Tensor:
        ctx.save_for_backward(difference, cells, channels)
        error = difference.square()
        if channels is not None:
            error *= channels
        if cells is not None:
            # Summing over the channels first: the weights of the cells then meet one channel, not all of them.
            error = error.sum(1, keepdim=True) * cells
        return error.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        difference, cells, channels = ctx.saved_tensors
        factor = 2 * outer if cells is None else 2 * outer * cells
        if channels is None:
            return difference * factor, None, None
        return (difference * channels).mul_(factor), None, None
