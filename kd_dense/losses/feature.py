"""Distances between feature maps. Gradients go to the student only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.errors import ConfigError
from kd_dense.losses.at_once import at_once, with_gradient
from kd_dense.losses.reduction import at_least_fp32, count_of, masked_mean, prepare, zero_outside
from kd_dense.registry import LOSSES


@LOSSES.register_module()
def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of squared differences over batch, channels and valid positions.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        mask: boolean ``[B, 1, h, w]``, positions that count.
    """
    student, teacher = prepare(student, teacher)
    # unlike F.mse_loss this keeps one map for the backward, not two, and not the teacher's
    return masked_mean(zero_outside(student - teacher, mask).square(), mask)


@LOSSES.register_module()
def l1(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of absolute differences over batch, channels and valid positions; arguments as for :func:`mse`."""
    student, teacher = prepare(student, teacher)
    return masked_mean(zero_outside(student - teacher, mask).abs(), mask)


@LOSSES.register_module()
@at_once
def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - cos`` of the channel vectors, mean over batch and valid positions, 0..2; arguments as for :func:`mse`."""
    student, teacher = (zero_outside(x, mask) for x in prepare(student, teacher))
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=1)[:, None], mask)


#: Axes over which :func:`normalized_mse` standardises -> dimensions of ``[B, C, h, w]``.
AXES = {'hw': (2, 3), 'c': (1,), 'chw': (1, 2, 3), 'bhw': (0, 2, 3)}


@with_gradient
def normalized_mse(
    student: Tensor, teacher: Tensor, axes: str = 'hw', eps: float = 1e-5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared difference of standardised maps, 0..4.

    Both maps are shifted and scaled to mean 0 and variance 1 over ``axes``, with the biased variance and ``eps`` inside
    the root. With ``axes='hw'`` and ``eps -> 0`` this is ``2 (1 - mean of the spatial Pearson correlation of each
    channel pair)``.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        axes: ``'hw'`` per image and channel, ``'c'`` per position, ``'chw'`` per image, ``'bhw'`` per channel over the
            batch.
        mask: boolean ``[B, 1, h, w]``; positions outside it take no part in the statistics, nor in the mean.
    """
    if axes not in AXES:
        raise ConfigError(f'axes must be one of {list(AXES)}, not {axes!r}')
    if axes == 'hw' and student.shape[2] * student.shape[3] < 2:
        raise ConfigError("axes='hw' needs maps of more than one cell: a single cell has no spatial pattern")
    dims, total = AXES[axes], count_of(student, mask)
    count = count_of(student, mask, dims)
    student, teacher = prepare(student, teacher)
    s, root = _standardized(student, dims, eps, mask, count)
    difference, _ = _standardized(teacher, dims, eps, mask, count)
    torch.sub(s, difference, out=difference)
    value = difference.square().sum() / total
    # d s_j / d x_i = (1[i = j] - (1 + s_i s_j) / n) / root, and the differences have mean 0
    along = (difference * s).sum(dims, keepdim=True) / count
    gradient = difference.addcmul_(s, along, value=-1.0).mul_(2 / (total * root))
    return value, gradient


def _standardized(
    x: Tensor, dims: tuple[int, ...], eps: float, mask: Tensor | None, count: Tensor | int
) -> tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps)`` over ``dims``, a new tensor and 0 outside the mask, and the root.

    Sums in place of ``var_mean`` and ``instance_norm``, which take several times as long on a CPU.
    """
    if mask is None:
        x = x - x.sum(dims, keepdim=True) / count
    else:
        x = zero_outside(x, mask)
        x.sub_(x.sum(dims, keepdim=True) / count).mul_(mask)  # a product will do: everything is finite here
    root = (x.square().sum(dims, keepdim=True) / count + eps).sqrt_()
    if mask is not None:
        root.masked_fill_(root == 0, 1.0)  # with eps = 0, where the mask leaves nothing
    return x.div_(root), root


def score_weighted_mse(student: Tensor, teacher: Tensor, score: Tensor, eps: float = 1e-9) -> Tensor:
    """``sum_{b,c,x} (S - T)^2 s / (C sum_{b,x} s + eps)``: squared error where the teacher sees something.

    Source: the loss of Ultralytics' ``distill_model`` (version 8.4), one level.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        score: ``[B, 1, h, w]``, >= 0; a constant, like the teacher.
    """
    student, teacher = prepare(student, teacher)
    score = at_least_fp32(score.detach())
    # Summing over the channels first keeps the weighted error at one channel; the map of products is never formed.
    error = (student - teacher).square().sum(1, keepdim=True)
    return (error * score).sum() / (score.sum() * student.shape[1] + eps)
