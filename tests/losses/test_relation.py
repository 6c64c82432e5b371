"""Relations between examples: the numbers worked in NumPy by loops, and the properties that belong to them."""

import itertools
import math

import numpy as np
import pytest
import torch

from kd_dense.losses.relation import angle_loss, distance_loss
from tests.helpers.dispatch import Operations

LOSSES = [distance_loss, angle_loss]
#: Teacher, student, L_D, L_A.
WORKED = {
    'right triangle': (
        [(0, 0), (3, 0), (0, 4)],
        [(0, 0), (1, 0), (0, 1)],
        0.00348125,
        0.00074448,
    ),
    'collinear': ([(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (0, 1)], 0.07169914, 3.5 / 27),
    'square': ([(0, 0), (1, 0), (1, 1), (0, 1)], [(0, 0), (1, 0), (2, 0), (3, 0)], 0.06784092, 0.14598665),
}


def examples(n=6, student=4, teacher=7):
    return torch.randn(n, student, dtype=torch.float64), 3 * torch.randn(n, teacher, dtype=torch.float64) + 1


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def distances(e):
    found = [[math.sqrt(((a - b) ** 2).sum()) for b in e] for a in e]
    mean = np.mean([d for i, row in enumerate(found) for j, d in enumerate(row) if i != j])
    return np.array(found) / mean


def cosines(e):
    n = len(e)
    found = np.zeros((n, n, n))
    for i, j, k in itertools.product(range(n), repeat=3):
        a, b = e[j] - e[i], e[k] - e[i]
        if a.any() and b.any():
            found[i, j, k] = a @ b / math.sqrt((a @ a) * (b @ b))
    return found


def by_loops(loss, student, teacher, exclude_degenerate=False):
    relate = {distance_loss: distances, angle_loss: cosines}[loss]
    s, t = relate(student.detach().numpy()), relate(teacher.numpy())
    places = itertools.product(range(len(student)), repeat=s.ndim)
    if exclude_degenerate:
        places = (p for p in places if len(set(p)) == len(p))
    return np.mean([huber(s[p] - t[p]) for p in places])


@pytest.mark.parametrize('name', WORKED)
def test_worked_numbers(name):
    teacher, student, distance, angle = WORKED[name]
    assert distance_loss(tensor(student), tensor(teacher)).item() == pytest.approx(distance, abs=5e-9)
    assert angle_loss(tensor(student), tensor(teacher)).item() == pytest.approx(angle, abs=5e-9)


@pytest.mark.parametrize('exclude_degenerate', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_equals_loops(loss, exclude_degenerate):
    student, teacher = examples()
    value = loss(student, teacher, exclude_degenerate=exclude_degenerate).item()
    assert value == pytest.approx(by_loops(loss, student, teacher, exclude_degenerate), rel=1e-12) and value > 1e-3


@pytest.mark.parametrize('loss', LOSSES)
def test_degenerate_terms_only_dilute(loss):
    student, teacher = examples(5)
    ratio = 5 / 4 if loss is distance_loss else 25 / (4 * 3)
    excluded = loss(student, teacher, exclude_degenerate=True)
    assert excluded.item() == pytest.approx(loss(student, teacher).item() * ratio, rel=1e-12)


@pytest.mark.parametrize('exclude_degenerate', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_an_example_upon_another(loss, exclude_degenerate):
    """In the student only: the angle there is 0, also where the teacher's is 1 because two corners are the same."""
    student, teacher = examples(5)
    student[3] = student[1]
    value = loss(student, teacher, exclude_degenerate=exclude_degenerate).item()
    assert value == pytest.approx(by_loops(loss, student, teacher, exclude_degenerate), rel=1e-6)


@pytest.mark.parametrize('loss', LOSSES)
def test_similar_figures_have_no_loss(loss):
    _, teacher = examples()
    rotation, _ = torch.linalg.qr(torch.randn(9, 7, dtype=torch.float64))  # orthonormal columns: 7 -> 9 dimensions
    moved = 0.3 * teacher @ rotation.T + 10 * torch.randn(9, dtype=torch.float64)
    padded = torch.cat([teacher, torch.zeros(6, 3, dtype=torch.float64)], 1)
    for student in (teacher.clone(), moved, padded):
        assert loss(student, teacher).item() == pytest.approx(0, abs=1e-20)
    assert loss(moved * torch.linspace(1, 2, 9, dtype=torch.float64), teacher).item() > 1e-4  # not all alike


@pytest.mark.parametrize('loss', LOSSES)
def test_order_does_not_matter_if_it_is_the_same(loss):
    student, teacher = examples()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student[order], teacher[order]), value)
    assert abs(loss(student[order], teacher) - value) > 1e-4


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('count', [0, 1, 2])
@pytest.mark.parametrize('loss', LOSSES)
def test_fewer_than_three_have_exactly_no_loss(loss, count, masked):
    student, teacher = examples(6 if masked else count)
    mask = torch.arange(6) < count if masked else None
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.item() == 0 and (student.grad == 0).all() and student.grad.shape == student.shape


@pytest.mark.parametrize('exclude_degenerate', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_mask_equals_the_examples_that_are_left(loss, exclude_degenerate):
    student, teacher = examples(9)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0]).bool()
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    whole, left = student.requires_grad_(), student.detach()[mask].requires_grad_()
    value, expected = (
        loss(whole, teacher, mask, exclude_degenerate),
        loss(left, teacher[mask], None, exclude_degenerate),
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(whole.grad[mask], left.grad, rtol=1e-9, atol=1e-12)
    assert (whole.grad[~mask] == 0).all() and left.grad.abs().max() > 1e-4


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_gradient(loss, masked):
    student, teacher = examples(5, 3)
    mask = torch.tensor([1, 1, 0, 1, 1]).bool() if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), student.requires_grad_())
    teacher.requires_grad_()
    loss(student, teacher, mask).backward()
    assert teacher.grad is None


@pytest.mark.parametrize('loss', LOSSES)
def test_coincident_examples_leave_the_gradient_finite(loss):
    student, teacher = examples(5)
    student[3] = student[1]
    student.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 1e-4
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    value = loss(same, teacher[:4])
    value.backward()
    assert (same.grad == 0).all() and value.item() > 0
    if loss is distance_loss:  # all at the mean distance
        expected = [
            [huber(float(i != j) - d) for j, d in enumerate(row)]
            for i, row in enumerate(distances(teacher[:4].numpy()))
        ]
        assert value.item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_a_small_distance_between_large_vectors_is_not_lost_in_fp32():
    student = torch.tensor([(1000.0, 1000.0), (1000.0, 1000.01), (1000.02, 1000.0)])
    teacher = torch.tensor([(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
    for loss in LOSSES:
        expected = by_loops(loss, student.double(), teacher.double())
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('loss', LOSSES)
def test_half_precision_is_computed_in_more(loss):
    student, teacher = (300 * x for x in examples())  # the squared norm leaves the range of fp16
    s, t = student.half().requires_grad_(), teacher.half()
    value = loss(s, t)
    value.backward()
    assert value.dtype == torch.float32 and s.grad.isfinite().all()
    assert value.item() == pytest.approx(by_loops(loss, s.double(), t.double()), rel=1e-5)
    b = loss(student.bfloat16(), teacher.bfloat16())
    assert b.item() == pytest.approx(by_loops(loss, student.bfloat16().double(), teacher.bfloat16().double()), rel=1e-5)


@pytest.mark.parametrize('loss', LOSSES)
def test_does_not_wait_for_the_device_and_has_no_loop_over_examples(loss):
    totals = []
    for count in (6, 40):
        student, teacher = examples(count)
        with Operations() as operations:
            loss(student.requires_grad_(), teacher, torch.arange(count) < count - 1).backward()
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]
