"""Distances between boxes, against SciPy and against loops in float64."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_dense.losses import box_l1, distribution_kl, giou_distance


def logits(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def boxes(*shape, size=6.0):
    """``[..., 4, P]`` with x1 < x2 and y1 < y2."""
    corner = torch.rand(*shape[:-1], 2, shape[-1], dtype=torch.float64) * 10
    return torch.cat([corner, corner + 0.1 + size * torch.rand_like(corner)], -2)


def giou_of(a, b):
    """Two boxes, by areas counted from their coordinates."""
    left, right = max(a[0], b[0]), min(a[2], b[2])
    top, bottom = max(a[1], b[1]), min(a[3], b[3])
    inter = (right - left) * (bottom - top) if right > left and bottom > top else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union - (hull - union) / hull


# -- distributions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 3.0, 10.0])
def test_kl_is_scipys_side_by_side(temperature):
    s, t = logits(2, 3, 4, 9, 5), logits(2, 3, 4, 9, 5)
    p, q = (softmax(x.numpy() / temperature, axis=3) for x in (t, s))
    expected = temperature**2 * rel_entr(p, q).sum(3).mean(2)
    np.testing.assert_allclose(distribution_kl(s, t, temperature).numpy(), expected, rtol=1e-10)


def test_kl_of_a_worked_case():
    """One side: even odds of two bins for the teacher, 3 to 1 for the student. The other sides are equal."""
    s, t = torch.zeros(4, 2, 1, dtype=torch.float64), torch.zeros(4, 2, 1, dtype=torch.float64)
    s[0, 0] = np.log(3)
    expected = (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) / 4
    assert distribution_kl(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_kl_is_zero_for_equal_shapes_and_never_below():
    s, t = logits(4, 17, 30), logits(4, 17, 30)
    assert (distribution_kl(s, t) > 0).all()
    assert distribution_kl(s + 5, s, 10.0).abs().max() < 1e-12  # a constant added to a side changes nothing


def test_kl_at_high_temperature_is_the_variance_of_the_difference():
    """``T^2 KL -> var(s - t) / 2`` over the bins (Hinton et al. 2015, section 2.1)."""
    s, t = logits(4, 9, 6), logits(4, 9, 6)
    expected = (s - t).var(1, correction=0).mean(0) / 2
    torch.testing.assert_close(distribution_kl(s, t, 1e4), expected, rtol=1e-3, atol=0)


def test_kl_gradient():
    s, t = logits(2, 4, 5, 3).requires_grad_(), logits(2, 4, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distribution_kl(x, t, 10.0), s)
    distribution_kl(s, t, 10.0).sum().backward()
    assert t.grad is None
    expected = 10 / 4 * ((s / 10).softmax(2) - (t / 10).softmax(2))  # T^2 / T, mean over 4 sides
    torch.testing.assert_close(s.grad, expected.detach())


# -- GIoU --------------------------------------------------------------------------------------------------------------


def test_giou_is_that_of_a_loop_over_boxes():
    s, t = boxes(2, 3, 40), boxes(2, 3, 40)
    found = giou_distance(s, t)
    overlap = 0
    for i, j, k in np.ndindex(2, 3, 40):
        value = giou_of(s[i, j, :, k].tolist(), t[i, j, :, k].tolist())
        overlap += value > 0
        assert found[i, j, k].item() == pytest.approx(1 - value, rel=1e-9)
    assert 10 < overlap < 230  # both kinds of pairs


@pytest.mark.parametrize(
    'a, b, distance',
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 0.0),
        ((0, 0, 2, 2), (0, 0, 2, 4), 0.5),
        ((0, 0, 1, 1), (1, 0, 2, 1), 1.0),  # side by side
        ((0, 0, 1, 1), (3, 0, 4, 1), 1.5),  # two empty places between them
        ((-1, -1, 1, 1), (1, 1, 3, 3), 1.5),  # corner to corner
    ],
)
def test_giou_of_worked_cases(a, b, distance):
    s, t = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (a, b))
    assert giou_distance(s, t).item() == pytest.approx(distance, abs=1e-12)


def test_giou_does_not_depend_on_place_and_scale():
    s, t = boxes(50), boxes(50)
    torch.testing.assert_close(giou_distance(7 * s - 30, 7 * t - 30), giou_distance(s, t))


def test_giou_of_boxes_without_area_is_finite():
    """Inside out, or a point: what an untrained head without an exponential may give."""
    s = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64).requires_grad_()
    for t in (boxes(2), torch.ones(4, 2, dtype=torch.float64)):
        value = giou_distance(s, t)
        assert value.isfinite().all() and (value >= 0).all() and (value <= 2).all()
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert gradient.isfinite().all()


def test_giou_and_l1_gradients():
    s, t = boxes(6).requires_grad_(), boxes(6).requires_grad_()
    for function in (giou_distance, box_l1):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, t), s)
        function(s, t).sum().backward()
        assert t.grad is None


def test_l1_is_the_mean_over_four_numbers():
    s, t = logits(3, 4, 8), logits(3, 4, 8)
    np.testing.assert_allclose(box_l1(s, t).numpy(), np.abs(s.numpy() - t.numpy()).mean(1), rtol=1e-12)


@pytest.mark.parametrize('function', [distribution_kl, giou_distance, box_l1])
def test_half_precision_is_computed_in_fp32(function):
    x = torch.rand(4, 7, 3).bfloat16() if function is distribution_kl else boxes(3).bfloat16()
    y = torch.rand(4, 7, 3).bfloat16() if function is distribution_kl else boxes(3).bfloat16()
    value = function(x.requires_grad_(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, function(x.double(), y.double()).float())
    value.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()
