"""Losses whose gradient is computed with their value: the same numbers, and nothing else is kept."""

import gc
import weakref

import pytest
import torch

from kd_dense.analysis.doctor.cost import kept_for_backward
from kd_dense.losses import (
    bernoulli_kl,
    channel_kl,
    class_kl,
    cosine,
    hcl,
    l1,
    mse,
    normalized_mse,
    score_weighted_mse,
)
from kd_dense.losses.at_once import at_once
from kd_dense.losses.focal import squared_error

SHAPE = (2, 5, 8, 6)


def score(mask):
    return torch.linspace(0, 1, 96).reshape(2, 1, 8, 6).to(mask.device)


CALLS = {
    'mse': lambda f, s, t, m: f(s, t, m),
    'l1': lambda f, s, t, m: f(s, t, m),
    'cosine': lambda f, s, t, m: f(s, t, m),
    'hcl': lambda f, s, t, m: f(s, t, m),
    'normalized_mse': lambda f, s, t, m: f(s, t, 'hw', mask=m),
    'score_weighted_mse': lambda f, s, t, m: f(s, t, score(m)),
    'class_kl': lambda f, s, t, m: f(s, t, 2.0, m),
    'bernoulli_kl': lambda f, s, t, m: f(s, t, 1.0, m),
    'channel_kl': lambda f, s, t, m: f(s, t, 4.0, m),
    'squared_error': lambda f, s, t, m: f(s, t, score(m), mask=m),
}
LOSSES = {
    f.__name__: f
    for f in (
        mse, l1, cosine, hcl, normalized_mse, score_weighted_mse, class_kl, bernoulli_kl, channel_kl, squared_error
    )
}  # fmt: skip
#: Those of a difference keep that; of the others the gradient is computed with the value.
AT_ONCE = [name for name, function in LOSSES.items() if hasattr(function, '__wrapped__')]


def standardized_apart(student, teacher, axes, mask):
    """``normalized_mse`` over positions, for autograd, one channel of one image after the other."""
    total = 0
    for b in range(student.shape[0]):
        for c in range(student.shape[1]):
            s, t = (x[b, c][mask[b, 0]] for x in (student, teacher))
            s, t = (x.float() if x.dtype.itemsize == 2 else x for x in (s, t))
            s, t = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (s, t))
            total = total + (s - t).square().sum()
    return total / (mask.sum() * student.shape[1])


#: The same losses for autograd alone.
PLAIN = {name: LOSSES[name].__wrapped__ for name in AT_ONCE} | {'normalized_mse': standardized_apart}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, 8, 6, generator=generator) > 0.2
    return student.requires_grad_(), teacher, mask


def test_which_are_computed_at_once():
    assert AT_ONCE == ['cosine', 'normalized_mse', 'class_kl', 'bernoulli_kl', 'channel_kl']


@pytest.mark.parametrize('name', AT_ONCE)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradient_are_those_of_the_plain_loss(name, dtype):
    found = []
    for function in (LOSSES[name], PLAIN[name]):
        student, teacher, mask = inputs(dtype)
        loss = CALLS[name](function, student, teacher, mask)
        (loss * 3).backward()
        found.append((loss.detach(), student.grad))
    assert found[0][1].dtype == dtype and found[0][0].dtype == found[1][0].dtype
    if name == 'normalized_mse':
        torch.testing.assert_close(found[0][0], found[1][0])
    else:
        assert torch.equal(found[0][0], found[1][0])
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-7) if half else {}  # rounded before the factor, not after
    torch.testing.assert_close(found[0][1], found[1][1], **tolerance)
    assert found[0][1].count_nonzero() > 0


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_one_tensor_is_kept_and_the_teacher_let_go(name, dtype):
    student, teacher, mask = inputs(dtype)
    x = student * 1  # as a connector gives it
    with kept_for_backward([student]) as kept:
        loss = CALLS[name](LOSSES[name], x, teacher, mask)
    if name in AT_ONCE:
        assert kept() == x.numel() * x.element_size()
    else:  # in fp32; masks, maps of one channel and pooled ones come with it
        assert x.numel() * 4 <= kept() < x.numel() * 4 * 2
    gone = [weakref.ref(teacher), weakref.ref(x)]
    del teacher, x
    gc.collect()
    assert [r() for r in gone] == [None, None]
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.count_nonzero() > 0


@pytest.mark.parametrize('name', AT_ONCE)
def test_the_plain_losses_keep_more(name):
    student, teacher, mask = inputs()
    x = student * 1
    with kept_for_backward([student]) as kept:
        loss = CALLS[name](PLAIN[name], x, teacher, mask)
    assert loss.requires_grad and kept() >= 2 * x.numel() * 4


def test_fp16_gradients_below_its_range_survive_a_scaled_loss():
    student = torch.full((1, 1, 64, 64), 1e-3, dtype=torch.float16, requires_grad=True)
    loss = at_once(mse)(student, torch.zeros_like(student))
    (loss * 2.0**16).backward()  # 2e-3 / 4096 = 5e-7 is a subnormal number of fp16, with a few bits left
    expected = 2 * float(student.detach()[0, 0, 0, 0]) / 4096 * 2**16
    torch.testing.assert_close(student.grad.double(), torch.full((1, 1, 64, 64), expected).double(), rtol=1e-3, atol=0)


def test_gradient_can_be_asked_for_again_but_not_for_itself():
    student, teacher, mask = inputs()
    loss = cosine(student, teacher, mask)
    first, second = (torch.autograd.grad(loss * k, student, retain_graph=True)[0] for k in (1, 2))
    torch.testing.assert_close(second, 2 * first)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match='does not require grad'):
        gradient.sum().backward()


@pytest.mark.parametrize('name', AT_ONCE)
def test_gradcheck(name):
    student, teacher, mask = inputs(torch.float64)
    teacher, mask = teacher[:1, :, :3, :3], mask[:1, :, :3, :3]
    student = student.detach()[:1, :, :3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: CALLS[name](LOSSES[name], s, teacher, mask), student)


def test_without_a_gradient_the_loss_runs_as_it_is():
    calls = []

    @at_once
    def loss(student, teacher):
        calls.append((torch.is_grad_enabled(), student))
        return (student - teacher).square().sum()

    student, teacher = torch.ones(3, requires_grad=True), torch.zeros(3)
    with torch.no_grad():
        assert not loss(student, teacher).requires_grad
    assert loss(student.detach(), teacher).grad_fn is None
    assert [x is student for _, x in calls] == [True, False] and loss.__name__ == 'loss'
    assert loss(student, teacher).requires_grad


def test_an_empty_mask_is_an_exact_zero_with_a_gradient():
    student, teacher, mask = inputs()
    loss = class_kl(student, teacher, 1.0, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and student.grad.count_nonzero() == 0
