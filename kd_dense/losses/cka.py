"""Centred kernel alignment of two sets of features: how alike two representations are. No gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_dense.losses.reduction import zero_outside

#: With fewer examples the unbiased estimator is not defined.
LEAST = 4


def hsic1(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion of two kernel matrices ``[n, n]``.

    With ``K`` and ``L`` after their diagonals were set to 0::

        1 / (n (n - 3)) * [tr(K L) + (1' K 1) (1' L 1) / ((n - 1) (n - 2)) - 2 / (n - 2) * 1' K L 1]

    Source: Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, as used by Nguyen et al., "Do Wide
    and Deep Networks Learn the Same Things?", ICLR 2021.

    Args:
        mask: boolean ``[n]``, examples that count.

    Returns:
        Scalar of any sign; 0 for fewer than four examples.
    """
    off_diagonal = ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    if mask is not None:
        off_diagonal = off_diagonal & mask[:, None] & mask
    first, second = zero_outside(first, off_diagonal), zero_outside(second, off_diagonal)
    count = mask.sum() if mask is not None else torch.full((), len(first), device=first.device)
    n = count.clamp(min=LEAST).to(first.dtype)
    rows, columns = first.sum(0), second.sum(0)  # symmetric matrices
    total = (first * second).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)
    return zero_outside(total / (n * (n - 3)), count >= LEAST)


def hsic_terms(student: Tensor, teacher: Tensor, mask: Tensor | None = None, least: int = LEAST) -> Tensor:
    """What :func:`cka` is made of, with linear kernels: ``[3]``, HSIC1 of ``(K, L)``, of ``(K, K)`` and of ``(L, L)``.

    Terms of several minibatches, or of several processes, are added up before :func:`cka` is taken. In fp64.

    Args:
        student, teacher: ``[n, d_S]`` and ``[n, d_T]``, row by row the same examples.
        mask: boolean ``[n]``, examples that count.
        least: with fewer examples the terms are 0.
    """
    own, their = (_linear_kernel(x, mask) for x in (student.detach(), teacher.detach()))
    terms = torch.stack([hsic1(own, their, mask), hsic1(own, own, mask), hsic1(their, their, mask)])
    if mask is not None:
        return zero_outside(terms, mask.sum() >= least)
    return terms if len(student) >= least else terms * 0


def _linear_kernel(x: Tensor, mask: Tensor | None) -> Tensor:
    """``X X'`` of the centred rows: centring changes nothing in HSIC1 but its rounding."""
    rows = None if mask is None else mask[:, None]
    x = zero_outside(x.double(), rows)
    count = len(x) if mask is None else mask.sum().clamp(min=1)
    x = zero_outside(x - x.sum(0) / count, rows)
    return x @ x.T


def cka(terms: Tensor) -> Tensor:
    """``HSIC1(K, L) / (sqrt(HSIC1(K, K)) sqrt(HSIC1(L, L)))`` of :func:`hsic_terms` ``[..., 3] -> [...]``.

    1 for representations that are equal but for rotation, scale and offset; about 0 for unrelated ones, and below it by
    chance.

    Returns:
        NaN where it can not be estimated: too few examples, or a side that is constant.
    """
    both, own, their = terms.unbind(-1)
    scale = own.sqrt() * their.sqrt()
    return torch.where(scale > 1e-12, both / scale, torch.nan)
