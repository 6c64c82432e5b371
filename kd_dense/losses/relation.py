"""Relations between examples: distances of pairs and angles of triplets. Gradients go to the student only.

Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, and the authors' public code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.reduction import at_least_fp32, zero_outside

#: Fewer examples have no relation: two always lie at the mean distance, and there is no angle without a third.
LEAST = 3
#: Smallest squared distance, as in the authors' code.
_EPS = 1e-12


def distance_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, exclude_degenerate: bool = False
) -> Tensor:
    """Mean over pairs of ``huber(d_S / mean d_S - d_T / mean d_T)`` of the distances ``d_ij = |e_i - e_j|``.

    ``huber(x)`` is ``x^2 / 2`` below 1 and ``|x| - 1/2`` above. The mean distance is over the pairs of different
    examples; the student's takes part in the gradient. As in the authors' code the mean of the loss is over all
    ``N^2`` pairs, each example with itself included.

    Args:
        student, teacher: ``[N, d_S]`` and ``[N, d_T]``, the same examples in the same order; the widths may differ.
        mask: boolean ``[N]``, examples that count.
        exclude_degenerate: take the mean over the ``N (N - 1)`` pairs of different examples.

    Returns:
        Scalar >= 0; exactly 0, with a gradient of 0, for fewer than three examples.
    """
    if len(student) < LEAST:
        return at_least_fp32(student).sum() * 0
    count = _count(student, mask)
    pairs = _different(student, mask)
    scaled = []
    for examples in (student, teacher.detach()):
        _, squared, apart = _relations(examples, mask)
        distances = zero_outside(squared.where(apart, _EPS).sqrt(), pairs)
        mean = distances.sum() / _at_least_one(count * (count - 1))
        scaled.append(distances / mean.clamp(min=_EPS))  # of fewer than two examples there is none
    total = F.smooth_l1_loss(*(zero_outside(x, pairs) for x in scaled), reduction='sum')
    return _mean(total, count, count * (count - 1 if exclude_degenerate else count)).to(at_least_fp32(student).dtype)


def angle_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, exclude_degenerate: bool = False
) -> Tensor:
    """Mean over triplets of ``huber(cos_S - cos_T)``, ``cos_ijk`` of the angle at ``i`` between ``j`` and ``k``.

    As in the authors' code the mean is over all ``N^3`` triplets, those in which an example occurs twice included:
    there the cosine is 0 (``i = j`` or ``i = k``) or 1 (``j = k``) on both sides.

    The cosines come from the Gram matrix ``G`` of the centred examples, ``<e_j - e_i, e_k - e_i> = G_jk - G_ij - G_ik +
    G_ii``, so that the differences, ``[N, N, d]``, are never formed.

    Args:
        student, teacher, mask: as for :func:`distance_loss`.
        exclude_degenerate: take the mean over the ``N (N - 1) (N - 2)`` triplets of different examples.

    Returns:
        Scalar >= 0; exactly 0, with a gradient of 0, for fewer than three examples.
    """
    if len(student) < LEAST:
        return at_least_fp32(student).sum() * 0
    count, pairs = _count(student, mask), _different(student, mask)
    ours, theirs = (_cosines(e, mask, pairs, at_least_fp32(student).dtype) for e in (student, teacher.detach()))
    if not exclude_degenerate:
        return _mean(F.smooth_l1_loss(ours, theirs, reduction='sum'), count, count**3)
    terms = F.smooth_l1_loss(ours, theirs, reduction='none')
    # Where j = k the two sides differ if j lies upon i in one of them.
    total = terms.sum() - terms.diagonal(dim1=1, dim2=2).sum()
    return _mean(total, count, count * (count - 1) * (count - 2))


def _cosines(examples: Tensor, mask: Tensor | None, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, N, N]``; 0 where ``j`` or ``k`` lies upon ``i``, and wherever one of the three does not count."""
    gram, squared, apart = _relations(examples, mask)
    apart = apart & pairs
    inverse = zero_outside(squared.where(apart, 1.0).rsqrt(), apart).to(dtype)
    products = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return products.to(dtype) * inverse[:, :, None] * inverse[:, None, :]


def _relations(examples: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix of the centred examples, squared distances, and which pairs lie apart; each ``[N, N]``.

    In fp64, which costs little for so few numbers: a small distance between large vectors is lost in the differences of
    products. Examples count as lying upon each other when their distance is below a millionth, or below a millionth of
    their distances from the centre, which is where fp32 features do not tell them apart.
    """
    examples = zero_outside(examples.double(), None if mask is None else mask[:, None])
    examples = examples - examples.sum(0) / _at_least_one(_count(examples, mask))
    examples = zero_outside(examples, None if mask is None else mask[:, None])
    gram = examples @ examples.T
    squares = gram.diagonal()
    around = squares[:, None] + squares
    squared = around - 2 * gram
    return gram, squared, squared.detach() > _EPS * (1 + around.detach())


def _count(examples: Tensor, mask: Tensor | None) -> int | Tensor:
    return len(examples) if mask is None else mask.sum()


def _different(examples: Tensor, mask: Tensor | None) -> Tensor:
    """Boolean ``[N, N]``: pairs of different examples that count."""
    different = ~torch.eye(len(examples), dtype=torch.bool, device=examples.device)
    return different if mask is None else different & mask[:, None] & mask


def _mean(total: Tensor, count: int | Tensor, terms: int | Tensor) -> Tensor:
    """``total / terms``; exactly 0 for fewer than three examples, which rounding would leave almost 0."""
    mean = total / _at_least_one(terms)
    return zero_outside(mean, count >= LEAST) if isinstance(count, Tensor) else mean


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
