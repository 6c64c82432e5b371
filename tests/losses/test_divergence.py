"""Kullback-Leibler losses against NumPy in float64 and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from kd_dense.losses import bernoulli_kl, channel_kl, class_kl
from tests.helpers.waits import Waits

LOSSES = [class_kl, bernoulli_kl, channel_kl]


def maps(*shape: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(*shape, dtype=torch.float64), scale * torch.randn(*shape, dtype=torch.float64)


def checkered(b: int, h: int, w: int) -> torch.Tensor:
    """A mask with a different number of positions in every image."""
    mask = torch.ones(b, 1, h, w, dtype=torch.bool)
    for i in range(b):
        mask[i, 0, : i + 1, ::2] = False
    return mask


# -- straightforward references ----------------------------------------------------------------------------------------


def class_kl_loops(student, teacher, temperature, mask):
    s, t = student.numpy(), teacher.numpy()
    values = []
    for b in range(s.shape[0]):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                if mask is None or mask[b, 0, y, x]:
                    p, q = softmax(t[b, :, y, x] / temperature), softmax(s[b, :, y, x] / temperature)
                    values.append(rel_entr(p, q).sum())
    return temperature**2 * np.mean(values)


def bernoulli_kl_loops(student, teacher, temperature, mask):
    s, t = student.numpy(), teacher.numpy()
    total, detections = 0.0, 0.0
    for b in range(s.shape[0]):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                if mask is None or mask[b, 0, y, x]:
                    for c in range(s.shape[1]):
                        p, q = expit(t[b, c, y, x] / temperature), expit(s[b, c, y, x] / temperature)
                        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
                    detections += expit(t[b, :, y, x]).max()
    return temperature**2 * total / max(1.0, detections)


def channel_kl_loops(student, teacher, temperature, mask):
    s, t = student.numpy(), teacher.numpy()
    total = 0.0
    for b in range(s.shape[0]):
        where = np.ones(s.shape[2:], bool) if mask is None else mask[b, 0].numpy()
        for c in range(s.shape[1]):
            p, q = softmax(t[b, c][where] / temperature), softmax(s[b, c][where] / temperature)
            total += rel_entr(p, q).sum()
    return temperature**2 * total / (s.shape[0] * s.shape[1])


REFERENCES = {class_kl: class_kl_loops, bernoulli_kl: bernoulli_kl_loops, channel_kl: channel_kl_loops}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 4.0, 0.5])
@pytest.mark.parametrize('loss', LOSSES)
def test_equals_loops_in_float64(loss, temperature, masked):
    student, teacher = maps(2, 5, 4, 6)
    mask = checkered(2, 4, 6) if masked else None
    expected = REFERENCES[loss](student, teacher, temperature, mask)
    assert loss(student, teacher, temperature, mask).item() == pytest.approx(expected, rel=1e-12)
    in_fp32 = loss(student.float(), teacher.float(), temperature, mask)
    assert in_fp32.dtype == torch.float32
    assert in_fp32.item() == pytest.approx(expected, rel=2e-5)


# -- worked numbers ----------------------------------------------------------------------------------------------------


def test_class_kl_worked():
    # teacher (3/4, 1/4), student (1/2, 1/2) at one of two pixels, equal at the other
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)
    student = torch.zeros(1, 2, 1, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert class_kl(student, teacher).item() == pytest.approx(kl / 2, rel=1e-6)
    only_first = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    assert class_kl(student, teacher, mask=only_first).item() == pytest.approx(kl, rel=1e-6)
    # T = 2 on doubled logits: the same probabilities, T^2 = 4 times the value
    assert class_kl(student, 2 * teacher, 2.0).item() == pytest.approx(4 * kl / 2, rel=1e-6)


def test_bernoulli_kl_worked():
    # One position, two classes: teacher 3/4 and 1/2, student 1/2 and 1/2; expected detections 3/4, below 1: divided by
    # 1.
    teacher = torch.tensor([math.log(3), 0.0]).reshape(1, 2, 1, 1)
    student = torch.zeros(1, 2, 1, 1)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert bernoulli_kl(student, teacher).item() == pytest.approx(kl, rel=1e-6)
    # Four such positions: 3 expected detections.
    assert bernoulli_kl(student.expand(1, 2, 2, 2), teacher.expand(1, 2, 2, 2)).item() == pytest.approx(
        4 * kl / 3, rel=1e-6
    )


def test_bernoulli_kl_takes_anchors_and_queries():
    student, teacher = maps(2, 3, 4, 5, 6)  # [B, C, A, h, w]
    mask = checkered(2, 5, 6)[:, :, None]
    flat = [x.reshape(2, 3, 20, 6) for x in (student, teacher)]
    expected = bernoulli_kl_loops(*flat, 1.0, mask.expand(2, 1, 4, 5, 6).reshape(2, 1, 20, 6))
    assert bernoulli_kl(student, teacher, mask=mask).item() == pytest.approx(expected, rel=1e-12)
    student, teacher = maps(2, 3, 7)  # [B, C, Q]
    expected = bernoulli_kl_loops(student[..., None], teacher[..., None], 1.0, None)
    assert bernoulli_kl(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_class_kl_with_anchors_counts_each_anchor():
    student, teacher = maps(2, 3, 4, 5, 6)
    mask = checkered(2, 5, 6)[:, :, None]
    flat = [x.reshape(2, 3, 20, 6) for x in (student, teacher)]
    expected = class_kl_loops(*flat, 2.0, mask.expand(2, 1, 4, 5, 6).reshape(2, 1, 20, 6))
    assert class_kl(student, teacher, 2.0, mask).item() == pytest.approx(expected, rel=1e-12)


def test_channel_kl_worked():
    # One channel, two positions: teacher (3/4, 1/4), student (1/2, 1/2); the other channel is equal: mean over C = 2.
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    student = torch.zeros(1, 2, 1, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert channel_kl(student, teacher).item() == pytest.approx(kl / 2, rel=1e-6)
    assert channel_kl(student, 3 * teacher, 3.0).item() == pytest.approx(9 * kl / 2, rel=1e-6)


def test_channel_kl_image_without_valid_position_adds_nothing():
    student, teacher = maps(2, 3, 4, 4)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1] = False
    alone = channel_kl_loops(student[:1], teacher[:1], 1.0, None)
    assert channel_kl(student, teacher, mask=mask).item() == pytest.approx(alone / 2, rel=1e-12)


# -- invariances and limits --------------------------------------------------------------------------------------------


def test_adding_a_constant_changes_nothing():
    student, teacher = maps(2, 5, 4, 6)
    per_pixel, per_channel = torch.randn(2, 1, 4, 6).double(), torch.randn(2, 5, 1, 1).double()
    a = class_kl(student, teacher, 2.0)
    torch.testing.assert_close(class_kl(student + per_pixel, teacher - 3 * per_pixel, 2.0), a)
    b = channel_kl(student, teacher, 2.0)
    torch.testing.assert_close(channel_kl(student + per_channel, teacher - 3 * per_channel, 2.0), b)


@pytest.mark.parametrize('loss', LOSSES)
def test_common_permutations_change_nothing_and_onesided_ones_do(loss):
    student, teacher = maps(2, 5, 4, 6)
    value = loss(student, teacher)
    places, channels = torch.randperm(24), torch.randperm(5)

    def shuffled(x):
        return x.flatten(2)[:, :, places].reshape(x.shape)[:, channels]

    torch.testing.assert_close(loss(shuffled(student), shuffled(teacher)), value)
    assert abs(loss(shuffled(student), teacher) - value) > 1e-3


@pytest.mark.parametrize('loss', LOSSES)
def test_equal_inputs_give_zero_and_no_gradient(loss):
    x = 5 * torch.randn(2, 5, 4, 6)
    student = x.clone().requires_grad_()
    value = loss(student, x, 3.0, checkered(2, 4, 6))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize('loss', LOSSES)
def test_is_never_negative_and_not_symmetric(loss):
    student, teacher = maps(3, 4, 5, 5)
    forth, back = loss(student, teacher), loss(teacher, student)
    assert forth > 0 and back > 0 and abs(forth - back) > 1e-3


def test_high_temperature_limit_is_half_the_variance_of_the_difference():
    # For T -> infinity, T^2 KL(softmax(t/T) || softmax(s/T)) -> Var_c(t - s) / 2 and the Bernoulli one -> (t - s)^2 /
    # 8.
    student, teacher = maps(2, 5, 3, 3)
    difference = (teacher - student).numpy()
    assert class_kl(student, teacher, 1e4).item() == pytest.approx(difference.var(axis=1).mean() / 2, rel=1e-3)
    expected = difference.reshape(2, 5, -1).var(axis=2).mean() / 2
    assert channel_kl(student, teacher, 1e4).item() == pytest.approx(expected, rel=1e-3)
    divisor = expit(teacher.numpy()).max(axis=1).sum()
    expected = (difference**2).sum() / 8 / divisor
    assert bernoulli_kl(student, teacher, 1e4).item() == pytest.approx(expected, rel=1e-3)


def test_class_gradient_is_t_times_difference_of_probabilities():
    student, teacher = maps(2, 5, 3, 4)
    student.requires_grad_()
    class_kl(student, teacher, 3.0).backward()
    p, q = softmax(teacher.numpy() / 3, axis=1), softmax(student.detach().numpy() / 3, axis=1)
    np.testing.assert_allclose(student.grad.numpy(), 3 * (q - p) / (2 * 3 * 4), rtol=1e-9)


def test_bernoulli_gradient_is_difference_of_probabilities():
    student, teacher = maps(2, 5, 3, 4)
    student.requires_grad_()
    bernoulli_kl(student, teacher, 2.0).backward()
    p, q = expit(teacher.numpy() / 2), expit(student.detach().numpy() / 2)
    np.testing.assert_allclose(
        student.grad.numpy(), 2 * (q - p) / expit(teacher.numpy()).max(axis=1).sum(), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_gradcheck(loss, masked):
    student, teacher = maps(2, 3, 2, 4)
    mask = checkered(2, 2, 4) if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 2.0, mask), student.requires_grad_())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('loss', LOSSES)
def test_extreme_logits_are_finite(loss, dtype):
    student = torch.tensor([1e4, -1e4, 1e4, -1e4, 0, 1e4, -1e4, 0]).reshape(1, 2, 2, 2).to(dtype).requires_grad_()
    teacher = torch.tensor([-1e4, 1e4, 1e4, -1e4, 1e4, 0, 0, -1e4]).reshape(1, 2, 2, 2).to(dtype)
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and value > 1e3
    assert student.grad.isfinite().all()


def test_extreme_bernoulli_value():
    # a certain teacher against a student certain of the opposite: the KL is the distance of the logits' parts, 1e4 +
    # 1e4 - 1e4
    value = bernoulli_kl(torch.full((1, 1, 1, 1), -1e4), torch.full((1, 1, 1, 1), 1e4))
    assert value.item() == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('loss', LOSSES)
def test_half_precision_is_reduced_in_fp32(loss, dtype):
    student, teacher = (x.to(dtype) for x in maps(2, 5, 16, 16))
    value = loss(student, teacher, 2.0)
    assert value.dtype == torch.float32
    exact = REFERENCES[loss](student.double(), teacher.double(), 2.0, None)  # of the rounded inputs
    assert value.item() == pytest.approx(exact, rel=2e-5)


@pytest.mark.parametrize('loss', LOSSES)
def test_empty_mask_gives_zero_and_a_finite_gradient(loss):
    student, teacher = (x.float() for x in maps(2, 5, 4, 4))
    student.requires_grad_()
    value = loss(student, teacher, mask=torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('loss', LOSSES)
def test_what_lies_outside_the_mask_does_not_matter(loss, bad):
    student, teacher = maps(2, 5, 4, 6)
    mask = checkered(2, 4, 6)
    expected = REFERENCES[loss](student, teacher, 1.0, mask)
    outside = ~mask.expand_as(student)
    student[outside] = bad
    teacher[outside] = bad
    student.requires_grad_()
    value = loss(student, teacher, mask=mask)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad.isfinite().all()
    assert (student.grad[outside] == 0).all() and (student.grad[~outside] != 0).all()


@pytest.mark.parametrize('loss', LOSSES)
def test_teacher_gets_no_gradient(loss):
    student, teacher = (x.requires_grad_() for x in maps(2, 5, 4, 4))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_counter_of_waits_counts():
    with Waits() as waits:
        torch.ones(2)[torch.tensor([True, False])]
        float(torch.ones(1))
    assert len(waits.seen) == 2


@pytest.mark.parametrize('loss', LOSSES)
def test_does_not_wait_for_the_device(loss):
    student, teacher = maps(2, 5, 4, 6)
    mask = checkered(2, 4, 6)
    student.requires_grad_()
    with Waits() as waits:
        loss(student, teacher, 2.0, mask).backward()
    assert waits.seen == []
