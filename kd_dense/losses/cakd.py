"""Losses of cross-architecture distillation: attention matrices of both sides, and what a discriminator thinks of them.

Heads are kept apart: ``q`` ``[B, h, N, d]``, ``k`` and ``v`` ``[B, h, M, d]``. Everything is computed in fp32 or
better, matrix products included: the products of values that nothing normalises leave the range of half precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.reduction import at_least_fp32, masked_mean


def swap(student: Tensor, teacher: Tensor, probability: float) -> Tensor:
    """``student`` with each element replaced by the teacher's with ``probability`` (0..1); equation 3's ``g``.

    Every call draws anew, on the device.
    """
    if probability == 0:
        return student
    return torch.where(torch.rand_like(student) < probability, teacher, student)


def scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """``q k^T / sqrt(d) + bias``: ``[B, h, N, M]``, before the softmax."""
    products = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return products if bias is None else products + bias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v``: ``[B, h, N, d]``; equation 2."""
    return scores(q, k, bias).softmax(-1) @ v


def attention_loss(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    replace_prob: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of attention outputs, the student's with elements swapped; equation 4, first term.

    Args:
        student, teacher: query, key and value of both, of equal shapes.
        bias: ``[1, h, N, M]``, added to the scores of both.
        replace_prob: share of the student's elements that are replaced by the teacher's, drawn for each matrix.
        mask: boolean ``[B, 1, N, 1]``, rows (places in the image) that count.
    """
    with _no_autocast(teacher[0]):
        teacher = [at_least_fp32(x.detach()) for x in teacher]
        student = [swap(at_least_fp32(s), t, replace_prob) for s, t in zip(student, teacher, strict=True)]
        # One memory layout on both sides: products of equal matrices are then equal to the last bit.
        student, teacher = ([x.contiguous() for x in side] for side in (student, teacher))
        bias = None if bias is None else at_least_fp32(bias.detach())
        return masked_mean((attend(*student, bias) - attend(*teacher, bias)).square(), mask)


def value_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of ``v v^T / sqrt(d)``, ``[B, h, M, M]``; equation 4, second term.

    Args:
        student, teacher: values ``[B, h, M, d]``; ``d`` and ``h`` may differ only if the means over heads are compared,
            for which there is :func:`score_loss`.
        mask: boolean ``[B, 1, M, 1]``; a pair counts when both of its places do.
    """
    with _no_autocast(teacher):
        student, teacher = at_least_fp32(student).contiguous(), at_least_fp32(teacher.detach()).contiguous()
        return masked_mean((scores(student, student) - scores(teacher, teacher)).square(), pairs(mask, mask))


def score_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of maps of scores ``[B, 1, N, M]``.

    Args:
        mask: boolean ``[B, 1, N, M]``.
    """
    return masked_mean((at_least_fp32(student) - at_least_fp32(teacher.detach())).square(), mask)


def mean_scores(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a b^T``, mean over the heads: ``[B, 1, N, M]``. The heads of two models need not agree for it."""
    with _no_autocast(a):
        a, b = at_least_fp32(a), at_least_fp32(b)
        # the mean over heads of products over channels is one product over both
        rows, columns = (x.transpose(1, 2).flatten(2) for x in (a, b))
        return (rows @ columns.transpose(-2, -1) * (scale / a.shape[1]))[:, None]


def pairs(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """Masks ``[B, 1, N, 1]`` and ``[B, 1, M, 1]`` -> mask ``[B, 1, N, M]`` of the pairs of which both count."""
    if rows is None or columns is None:
        return None
    return rows & columns.transpose(-2, -1)


def discriminator_loss(real: Tensor, fake: Tensor, mask: Tensor | None = None) -> Tensor:
    """``mean of -log D(teacher) - log(1 - D(student))``; equation 8. ``2 log 2`` for logits of 0.

    Args:
        real, fake: logits for the teacher's and the student's features, of equal shape.
        mask: boolean, broadcast to them; logits that count.
    """
    real, fake = at_least_fp32(real), at_least_fp32(fake)
    return masked_mean(F.softplus(-real) + F.softplus(fake), mask)


def deception_loss(fake: Tensor, form: str = 'non_saturating', mask: Tensor | None = None) -> Tensor:
    """What the student minimises so that the discriminator takes it for the teacher.

    Args:
        fake: logits for the student's features.
        form: ``'saturating'``: ``mean of log(1 - D)``, equation 9; ``'non_saturating'``: ``mean of -log D``, which has
            the same aim but a large gradient where the discriminator is sure.
        mask: boolean, broadcast to them; logits that count.
    """
    fake = at_least_fp32(fake)
    return masked_mean(-F.softplus(fake) if form == 'saturating' else F.softplus(-fake), mask)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
