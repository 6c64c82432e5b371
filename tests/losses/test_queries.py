"""Losses between matched queries against loops in float64, and the properties of the generalised IoU."""

import math

import pytest
import torch
from scipy.special import expit, softmax

from kd_dense.losses.queries import corners, foreground, giou, query_class_kl, query_giou, query_l1
from tests.helpers.queries import ACTIVATIONS, boxes, kl, overlap

L, B, N = 2, 2, 3


def logits(activation='sigmoid', dtype=torch.float64):
    return 2 * torch.randn(L, B, N, ACTIVATIONS[activation], dtype=dtype)


def scores():
    return torch.rand(L, B, N, dtype=torch.float64)


def reference(values, weights, f):
    """``values(l, b, i)``: sum over images and pairs per expected object, mean over layers."""
    layers = []
    for layer in range(f.shape[0]):
        total = sum(weights[layer, b, i] * values(layer, b, i) for b in range(f.shape[1]) for i in range(f.shape[2]))
        layers.append(total / max(1.0, f[layer].sum()))
    return sum(layers) / len(layers)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize(('temperature', 'negative'), [(1.0, 1.0), (2.5, 0.3), (1.0, 0.0), (1.0, 2.0)])
def test_class_kl(activation, temperature, negative):
    student, teacher, f = logits(activation), logits(activation), scores()
    value = query_class_kl(student, teacher, f, activation, temperature, negative).item()
    s, t, f = (x.numpy() for x in (student / temperature, teacher / temperature, f))
    expected = reference(lambda *at: kl(s[at], t[at], activation), f + negative * (1 - f), f)
    assert value == pytest.approx(temperature**2 * expected, rel=1e-10)


def test_boxes():
    student, teacher, f = boxes(L, B, N), boxes(L, B, N), 3 * scores()
    s, t, weights = (x.numpy() for x in (student, teacher, f))
    expected = reference(lambda *at: abs(s[at] - t[at]).sum(), weights, weights)
    assert query_l1(student, teacher, f).item() == pytest.approx(expected, rel=1e-10)
    expected = reference(lambda *at: 1 - overlap(s[at], t[at]), weights, weights)
    assert query_giou(student, teacher, f).item() == pytest.approx(expected, rel=1e-10)


def test_worked_numbers():
    # one certain object: teacher says 3/4 and 1/4, student 1/2 each
    student, teacher = torch.zeros(1, 1, 1, 2).double(), torch.tensor([math.log(3), -math.log(3)]).double()
    one = torch.ones(1, 1, 1).double()
    expected = 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert query_class_kl(student, teacher.view(1, 1, 1, 2), one, 'sigmoid').item() == pytest.approx(expected)
    # a unit square, and one beside it at a distance of its side: union 2, hull 3
    side = torch.tensor([[0.5, 0.5, 1, 1], [2.5, 0.5, 1, 1]]).double()
    assert giou(corners(side[0]), corners(side[1])).item() == pytest.approx(2 / 3 - 1)
    assert query_giou(side[0].view(1, 1, 1, 4), side[1].view(1, 1, 1, 4), one).item() == pytest.approx(4 / 3)
    assert query_l1(side[0].view(1, 1, 1, 4), side[1].view(1, 1, 1, 4), one / 2).item() == pytest.approx(1)


def test_foreground():
    x = logits('sigmoid')
    torch.testing.assert_close(foreground(x, 'sigmoid'), torch.from_numpy(expit(x.numpy()).max(-1)))
    x = logits('softmax')
    torch.testing.assert_close(foreground(x, 'softmax'), torch.from_numpy(1 - softmax(x.numpy(), -1)[..., -1]))
    # an object that is all but impossible keeps its digits
    assert foreground(torch.tensor([0.0, 40.0]).double(), 'softmax').item() == pytest.approx(math.exp(-40), rel=1e-6)


def test_fewer_than_one_object_are_not_blown_up():
    student, teacher, f = boxes(L, B, N), boxes(L, B, N), 1e-3 * scores()
    assert query_l1(student, teacher, f).item() < 4 * B * N * 1e-3
    none = torch.zeros_like(f)
    for loss in (query_l1, query_giou):
        s = student.clone().requires_grad_()
        value = loss(s, teacher, none)
        value.backward()
        assert value.item() == 0 and (s.grad == 0).all()


# -- properties --------------------------------------------------------------------------------------------------------


def test_giou_of_all_pairs():
    a, b = boxes(3), boxes(5)
    pairs = giou(corners(a)[:, None], corners(b)[None])
    assert pairs.shape == (3, 5) and (pairs.abs() <= 1).all()
    for i in range(3):
        for j in range(5):
            assert pairs[i, j].item() == pytest.approx(overlap(a[i].tolist(), b[j].tolist()), rel=1e-10)
    torch.testing.assert_close(giou(corners(a), corners(a)), torch.ones(3).double())
    # pixels of an image that is not square in place of shares of it
    scale = torch.tensor([640.0, 480.0, 640.0, 480.0]).double()
    torch.testing.assert_close(giou(corners(a * scale)[:, None], corners(b * scale)[None]), pairs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_boxes_that_are_points_are_finite(dtype):
    point = torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]], dtype=dtype)
    for other in (point, boxes(1, 1, 1, dtype=dtype)):
        s = point.clone().requires_grad_()
        value = query_giou(s, other, torch.ones(1, 1, 1, dtype=dtype))
        value.backward()
        assert value.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_gradients(activation):
    f, t, b = scores(), logits(activation), boxes(L, B, N)
    student = logits(activation).requires_grad_(), boxes(L, B, N).requires_grad_()

    def loss(s, box):
        return query_class_kl(s, t, f, activation, 2.0, 0.5) + query_l1(box, b, f) + query_giou(box, b, f)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_equal_predictions_cost_nothing_and_only_the_student_learns(activation):
    student, teacher, f = logits(activation).requires_grad_(), logits(activation).requires_grad_(), scores()
    f.requires_grad_()
    query_class_kl(student, teacher, f, activation).backward()
    assert teacher.grad is None and f.grad is None and (student.grad != 0).all()
    assert query_class_kl(student, student.detach(), f, activation).item() == pytest.approx(0, abs=1e-14)
    box = boxes(L, B, N)
    assert query_l1(box, box, f).item() == 0 and query_giou(box, box, f).item() == pytest.approx(0, abs=1e-14)


def test_half_precision_is_reduced_in_fp32():
    student, teacher = logits().bfloat16(), logits().bfloat16()
    value = query_class_kl(student, teacher, scores().bfloat16(), 'sigmoid')
    assert value.dtype == torch.float32 and value.isfinite()
    box, other = boxes(L, B, N).bfloat16(), boxes(L, B, N).bfloat16()
    f = torch.ones(L, B, N)
    exact = query_l1(box.double(), other.double(), f.double()), query_giou(box.double(), other.double(), f.double())
    for value, expected in zip((query_l1(box, other, f), query_giou(box, other, f)), exact, strict=True):
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-5)
