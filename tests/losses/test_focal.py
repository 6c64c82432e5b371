"""Attention and weighted squared errors against NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from kd_dense.losses.focal import attention, attention_distance, squared_error
from tests.helpers.dispatch import Operations


def spatial_attention(*args):
    return attention(*args)[0]


def channel_attention(*args):
    return attention(*args)[1]


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64), 3 * torch.randn(*shape, dtype=torch.float64) + 1


def ragged(b, h, w):
    """A different part of each image counts."""
    mask = torch.ones(b, 1, h, w, dtype=torch.bool)
    for i in range(b):
        mask[i, 0, h - i :] = False
        mask[i, 0, :, w - i :] = False
    return mask


def attention_loops(x, temperature, mask=None):
    """Spatial ``[B, h, w]`` and channel attention ``[B, C]``, cell by cell."""
    b_, c_, h, w = x.shape
    spatial, channel = np.zeros((b_, h, w)), np.zeros((b_, c_))
    for b in range(b_):
        cells = [(i, j) for i in range(h) for j in range(w) if mask is None or mask[b, 0, i, j]]
        size = {(i, j): [abs(x[b, c, i, j]) for c in range(c_)] for i, j in cells}
        powers = {p: math.exp(np.mean(size[p]) / temperature) for p in cells}
        for i, j in cells:
            spatial[b, i, j] = len(cells) * powers[i, j] / sum(powers.values())
        powers = [math.exp(np.mean([size[p][c] for p in cells]) / temperature) for c in range(c_)]
        channel[b] = c_ * np.array(powers) / sum(powers)
    return spatial, channel


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_attention_equals_loops(masked, temperature):
    x, _ = maps(3, 4, 5, 6)
    mask = ragged(3, 5, 6) if masked else None
    spatial, channel = attention_loops(x.numpy(), temperature, mask)
    np.testing.assert_allclose(spatial_attention(x, temperature, mask)[:, 0], spatial, rtol=1e-12)
    np.testing.assert_allclose(channel_attention(x, temperature, mask)[:, :, 0, 0], channel, rtol=1e-12)


def test_attention_has_the_mean_one_over_what_counts():
    x, _ = maps(3, 4, 5, 6)
    mask = ragged(3, 5, 6)
    spatial = spatial_attention(x, 0.5, mask)
    assert (spatial[~mask] == 0).all()
    torch.testing.assert_close(spatial.sum((1, 2, 3)), mask.sum((1, 2, 3)).double())
    torch.testing.assert_close(channel_attention(x, 0.5, mask).sum((1, 2, 3)), torch.full((3,), 4.0).double())


def test_attention_is_even_at_a_high_temperature_and_a_single_cell_at_a_low_one():
    x, _ = maps(2, 3, 4, 5)
    torch.testing.assert_close(spatial_attention(x, 1e9), torch.ones(2, 1, 4, 5).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(channel_attention(x, 1e9), torch.ones(2, 3, 1, 1).double(), rtol=1e-6, atol=0)
    peak = spatial_attention(x, 1e-4)
    assert peak.amax((2, 3)).flatten().tolist() == pytest.approx([20, 20])
    assert torch.equal(peak.flatten(1).argmax(1), x.abs().mean(1).flatten(1).argmax(1))


def test_attention_does_not_know_signs_and_moves_with_cells_and_channels():
    x, _ = maps(2, 3, 4, 5)
    torch.testing.assert_close(spatial_attention(-x, 0.5), spatial_attention(x, 0.5))
    order = torch.randperm(3)
    torch.testing.assert_close(channel_attention(x[:, order], 0.5), channel_attention(x, 0.5)[:, order])
    torch.testing.assert_close(spatial_attention(x.flip(3), 0.5), spatial_attention(x, 0.5).flip(3))


@pytest.mark.parametrize('function', [spatial_attention, channel_attention])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_attention_knows_nothing_of_what_lies_outside(function, bad):
    x, _ = maps(3, 4, 5, 6)
    mask = ragged(3, 5, 6)
    expected = function(x, 0.5, mask)
    x = torch.where(mask, x, bad).requires_grad_()
    value = function(x, 0.5, mask)
    torch.testing.assert_close(value, expected)
    value.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[~mask.expand_as(x)] == 0).all() and x.grad.abs().sum() > 0


def test_an_image_without_a_cell_that_counts():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1] = False
    spatial, channel = spatial_attention(x, 0.5, mask), channel_attention(x, 0.5, mask)
    assert (spatial[1] == 0).all() and (channel[1] == 1).all()
    (spatial.square().sum() + channel.square().sum()).backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all()


@pytest.mark.parametrize('function', [spatial_attention, channel_attention])
def test_attention_gradcheck(function):
    x, _ = maps(2, 3, 3, 4)
    x = x + x.sign() * 0.1  # away from the corner of the absolute value
    assert torch.autograd.gradcheck(lambda s: function(s, 0.5, ragged(2, 3, 4)), x.requires_grad_())


def test_attention_distance():
    student, teacher = maps(2, 1, 3, 4)
    expected = sum(abs(student - teacher).flatten().tolist()) / 2
    assert attention_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert attention_distance(student, student.clone()) == 0


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('weighted', ['', 'cells', 'channels', 'cells channels'])
def test_squared_error_equals_loops(weighted, masked):
    student, teacher = maps(3, 2, 4, 5)
    cells = torch.rand(3, 1, 4, 5).double() if 'cells' in weighted else None
    channels = torch.rand(3, 2, 1, 1).double() if 'channels' in weighted else None
    mask = ragged(3, 4, 5) if masked else None
    total = 0.0
    for b, c, i, j in np.ndindex(3, 2, 4, 5):
        if mask is None or mask[b, 0, i, j]:
            weight = (1 if cells is None else cells[b, 0, i, j].item()) * (
                1 if channels is None else channels[b, c, 0, 0].item()
            )
            total += weight * (student[b, c, i, j] - teacher[b, c, i, j]).item() ** 2
    assert squared_error(student, teacher, cells, channels, mask).item() == pytest.approx(total / 3, rel=1e-12)


def test_squared_error_of_equal_maps_and_of_no_weight():
    student, teacher = (x.float().requires_grad_() for x in maps(2, 3, 4, 5))
    assert squared_error(student, student.detach().clone()) == 0
    for nothing in (
        dict(cells=torch.zeros(2, 1, 4, 5)),
        dict(mask=torch.zeros(2, 1, 4, 5, dtype=torch.bool)),
    ):
        student.grad = None
        value = squared_error(student, teacher, **nothing)
        value.backward()
        assert value == 0 and (student.grad == 0).all()


def test_what_lies_outside_need_not_be_finite():
    student, teacher = maps(3, 2, 4, 5)
    mask, cells = ragged(3, 4, 5), torch.rand(3, 1, 4, 5).double()
    expected = squared_error(student, teacher, cells, mask=mask)
    student, teacher = (torch.where(mask, x, math.nan) for x in (student, teacher))
    value = squared_error(student.requires_grad_(), teacher, cells, mask=mask)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert student.grad.isfinite().all()


def test_squared_error_gradient_goes_to_the_student_only():
    student, teacher = (x.requires_grad_() for x in maps(2, 3, 3, 4))
    cells, channels = torch.rand(2, 1, 3, 4).double().requires_grad_(), torch.rand(2, 3, 1, 1).double().requires_grad_()
    mask = ragged(2, 3, 4)
    assert torch.autograd.gradcheck(lambda s: squared_error(s, teacher, cells, channels, mask), student)
    squared_error(student, teacher, cells, channels, mask).backward()
    assert all(x.grad is None for x in (teacher, cells, channels))


def test_squared_error_keeps_the_difference_and_no_other_map():
    student, teacher = maps(2, 3, 8, 8)
    cells, channels = torch.rand(2, 1, 8, 8).double(), torch.rand(2, 3, 1, 1).double()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = squared_error(student.requires_grad_(), teacher, cells, channels)
    full = [x for x in kept if x.shape == student.shape]
    assert len(full) == 1 and torch.equal(full[0], (student - teacher).detach())
    with Operations() as operations:
        value.backward()
    # the gradient is formed in place: one product makes a map, the other writes into it
    assert operations.counts['mul_'] == 1 and operations.counts['pow'] == 0
    torch.testing.assert_close(student.grad, (student - teacher).detach() * cells * channels)  # 2 / B is 1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_fp32(dtype):
    student, teacher = (300 * x.to(dtype) for x in maps(2, 4, 32, 32))
    value = squared_error(student, teacher)
    assert value.dtype == torch.float32
    expected = ((student.double() - teacher.double()) ** 2).sum().item() / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for function in (spatial_attention, channel_attention):
        own = function(student, 200.0)
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), function(student.double(), 200.0), rtol=1e-4, atol=1e-6)


def test_does_not_wait_for_the_device():
    student, teacher = maps(2, 3, 4, 6)
    mask = ragged(2, 4, 6)
    student.requires_grad_()
    with Operations() as operations:
        where, channels = spatial_attention(teacher, 0.5, mask), channel_attention(teacher, 0.5, mask)
        loss = squared_error(student, teacher, where, channels, mask)
        (loss + attention_distance(spatial_attention(student, 0.5, mask), where)).backward()
    assert operations.seen == [] and operations.uploads == []
