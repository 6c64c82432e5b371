"""Centred kernel alignment: worked numbers, an independent form of the estimator, and its invariances."""

import itertools

import numpy as np
import pytest
import torch

from kd_dense.losses.cka import cka, hsic1, hsic_terms
from tests.helpers.dispatch import Operations

#: X, Y, HSIC1 of (K, L), (K, K), (L, L), CKA.
WORKED = {
    'affine': ([1, 2, 3, 4], [3, 5, 7, 9], None, 2.166667, None, 1.0),
    'negative': ([1, 2, 3, 4], [1, 0, 0, 1], -0.416667, 2.166667, None, -0.693375),
    'half': ([(1, 0), (0, 1), (-1, 0), (0, -1)], [1, 1, -1, -1], 0.666667, 0.666667, 2.666667, 0.5),
    'squares': ([0, 1, 2, 3, 4], [0, 1, 4, 9, 16], 78.166667, 5.166667, 1276.9, 0.962361),
}


def rows(values):
    return torch.tensor(values, dtype=torch.float64).reshape(len(values), -1)


def features(n=12, widths=(5, 8)):
    x = torch.randn(n, widths[0], dtype=torch.float64)
    mixed = x @ torch.randn(widths[0], widths[1], dtype=torch.float64)
    return x, mixed + torch.randn(n, widths[1], dtype=torch.float64)


def by_tuples(k, l):  # noqa: E741
    """The U statistic: over all tuples of four different examples, mean of K_ij (L_ij + L_qr - 2 L_iq)."""
    n = len(k)
    return np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(n), 4)])


@pytest.mark.parametrize('name', WORKED)
def test_worked_numbers(name):
    x, y, both, own, their, alignment = WORKED[name]
    terms = hsic_terms(rows(x), rows(y))
    for value, expected in zip(terms.tolist(), (both, own, their)):
        assert expected is None or value == pytest.approx(expected, abs=5e-7)
    assert cka(terms).item() == pytest.approx(alignment, abs=5e-7)


def test_is_the_unbiased_estimator():
    x, y = features(7)
    k, l = (x @ x.T, y @ y.T)  # noqa: E741
    assert hsic1(k, l).item() == pytest.approx(by_tuples(k.numpy(), l.numpy()), rel=1e-10)


def test_is_about_zero_for_unrelated_features_where_the_biased_one_is_about_one():
    values = [cka(hsic_terms(torch.randn(32, 2048), torch.randn(32, 512))).item() for _ in range(40)]
    assert abs(np.mean(values)) < 4 * 0.047 / np.sqrt(40) and 0.02 < np.std(values) < 0.1


def test_rotation_scale_and_offset_change_nothing():
    x, y = features()
    value = cka(hsic_terms(x, y)).item()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    moved = 0.01 * y @ rotation + 1e3 * torch.randn(8, dtype=torch.float64)
    assert cka(hsic_terms(x, moved)).item() == pytest.approx(value, rel=1e-6) and 0.1 < value < 0.99
    assert cka(hsic_terms(x, x)).item() == pytest.approx(1, rel=1e-12)
    assert cka(hsic_terms(y, moved)).item() == pytest.approx(1, rel=1e-6)
    assert abs(cka(hsic_terms(x, y * torch.linspace(1, 9, 8))).item() - value) > 1e-3


def test_mask_equals_the_examples_that_are_left():
    x, y = features(10)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1]).bool()
    expected = hsic_terms(x[mask], y[mask])
    x[~mask], y[~mask] = torch.nan, torch.inf
    torch.testing.assert_close(hsic_terms(x, y, mask), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize('masked', [False, True])
def test_too_few_examples_or_a_constant_side_can_not_be_estimated(masked):
    x, y = features(8)
    mask = torch.arange(8) < 3
    few = hsic_terms(x, y, mask) if masked else hsic_terms(x[:3], y[:3])
    assert (few == 0).all() and cka(few).isnan()
    least = hsic_terms(x, y, mask | (torch.arange(8) < 6), 7) if masked else hsic_terms(x[:6], y[:6], least=7)
    assert (least == 0).all()
    constant = torch.ones(8, 3, dtype=torch.float64)
    assert cka(hsic_terms(x, constant)).isnan() and cka(hsic_terms(constant, constant)).isnan()


def test_terms_of_minibatches_are_added_up():
    batches = [features(n) for n in (8, 8)]
    terms = [hsic_terms(x, y) for x, y in batches]
    both, own, their = (sum(t[i].item() for t in terms) / 2 for i in range(3))
    assert cka(sum(terms)).item() == pytest.approx(both / np.sqrt(own * their), rel=1e-12)
    stacked = torch.stack([*terms, hsic_terms(torch.ones(8, 2), torch.ones(8, 2))])
    torch.testing.assert_close(cka(stacked)[:2], torch.stack([cka(t) for t in terms]))
    assert cka(stacked)[2].isnan()


def test_no_gradient_and_no_waiting():
    x, y = (v.bfloat16().requires_grad_() for v in features())
    with Operations() as operations:
        terms = hsic_terms(x, y, torch.arange(12) < 9)
        cka(terms)
    assert not terms.requires_grad and terms.dtype == torch.float64
    assert operations.seen == [] and operations.uploads == []
