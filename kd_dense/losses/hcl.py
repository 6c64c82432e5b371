"""Hierarchical context loss: a distance between maps at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.reduction import masked_mean, prepare, zero_outside
from kd_dense.registry import LOSSES


@LOSSES.register_module()
def hcl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Mean squared difference at full resolution and after average pooling to ``l x l`` cells, weighted 1, 1/2, 1/4...

    ``(MSE(S, T) + sum_i 2^-i MSE(pool(S, l_i), pool(T, l_i))) / (1 + sum_i 2^-i)`` over the ``l_i`` in ``levels`` that
    are smaller than the height of the maps; a level that is left out does not use up a factor of 1/2. Only the height
    decides: a map narrower than ``l`` is still pooled to ``l`` columns.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, as used in TransKD's code. The mask is
    ours.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        mask: boolean ``[B, 1, h, w]``, positions that count; a pooled cell is the mean of its valid positions, and
            counts when it has any.
        levels: cells per side of the pooled maps, in the order of their weights.
    """
    student, teacher = prepare(student, teacher)
    # Pooling is linear: one pooled difference says as much as two pooled maps.
    difference = zero_outside(student - teacher, mask)
    total, weight, weights = masked_mean(difference.square(), mask), 1.0, 1.0
    for cells in levels:
        if cells >= student.shape[2]:
            continue
        weight /= 2
        weights += weight
        pooled, valid = average_pool(difference, cells), None
        if mask is not None:
            share = average_pool(mask.to(pooled.dtype), cells)
            valid = share > 0
            pooled = pooled / share.where(valid, 1.0)
        total = total + weight * masked_mean(pooled.square(), valid)
    return total / weights


def average_pool(x: Tensor, cells: int) -> Tensor:
    """``[B, C, h, w] -> [B, C, cells, cells]``, as adaptive average pooling does."""
    h, w = x.shape[2:]
    if h % cells or w % cells:
        return F.adaptive_avg_pool2d(x, cells)
    # A plain reduction where the cells are equal: on a GPU adaptive pooling gives each output cell to a single thread.
    return x.reshape(*x.shape[:2], cells, h // cells, cells, w // cells).mean((3, 5))
