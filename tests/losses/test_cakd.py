"""Losses of cross-architecture distillation against NumPy in float64, and the properties that belong to them."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_expit, softmax

from kd_dense.losses import cakd
from kd_dense.losses.cakd import (
    attend,
    attention_loss,
    deception_loss,
    discriminator_loss,
    mean_scores,
    pairs,
    score_loss,
    scores,
    swap,
    value_loss,
)
from tests.helpers.waits import Waits

B, H, N, M, D = 2, 3, 5, 4, 6


def matrices(n=N, m=M, d=D, dtype=torch.float64):
    return [torch.randn(B, H, count, d, dtype=dtype) for count in (n, m, m)]


def outputs(q, k, v, bias=0.0):
    """Attention outputs, query by query."""
    q, k, v = (x.detach().numpy() for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                row = np.array([q[b, h, i] @ k[b, h, j] for j in range(k.shape[2])]) / math.sqrt(q.shape[3])
                row = row + (bias[0, h, i] if isinstance(bias, np.ndarray) else bias)
                out[b, h, i] = softmax(row) @ v[b, h]
    return out


def relations(v):
    v = v.detach().numpy()
    return np.einsum('bhid,bhjd->bhij', v, v) / math.sqrt(v.shape[3])


def rows(n):
    mask = torch.ones(B, 1, n, 1, dtype=torch.bool)
    mask[0, 0, 0], mask[1, 0, 2] = False, False
    return mask


# -- values ------------------------------------------------------------------------------------------------------------


def test_attend_equals_loops():
    q, k, v = matrices()
    bias = torch.randn(1, H, N, M).double()
    torch.testing.assert_close(attend(q, k, v), torch.tensor(outputs(q, k, v)))
    torch.testing.assert_close(attend(q, k, v, bias), torch.tensor(outputs(q, k, v, bias.numpy())))


@pytest.mark.parametrize('masked', [False, True])
def test_attention_loss_equals_numpy(masked):
    student, teacher, bias = matrices(), matrices(), torch.randn(1, H, N, M).double()
    mask = rows(N) if masked else None
    difference = (outputs(*student, bias.numpy()) - outputs(*teacher, bias.numpy())) ** 2
    if masked:
        difference = difference[np.broadcast_to(mask.numpy(), difference.shape)]
    value = attention_loss(student, teacher, bias, 0.0, mask)
    assert value.item() == pytest.approx(difference.mean(), rel=1e-12)


@pytest.mark.parametrize('masked', [False, True])
def test_value_loss_equals_numpy(masked):
    student, teacher = torch.randn(B, H, M, D).double(), torch.randn(B, H, M, D).double()
    difference = (relations(student) - relations(teacher)) ** 2
    mask = rows(M) if masked else None
    if masked:
        kept = mask.numpy()[:, :, :, 0]
        both = kept[:, :, :, None] & kept[:, :, None, :]
        difference = difference[np.broadcast_to(both, difference.shape)]
    assert value_loss(student, teacher, mask).item() == pytest.approx(difference.mean(), rel=1e-12)


def test_mean_scores_is_the_mean_over_heads():
    q, k, _ = matrices()
    expected = np.einsum('bhid,bhjd->bhij', q.numpy(), k.numpy()).mean(1, keepdims=True) * 0.3
    torch.testing.assert_close(mean_scores(q, k, 0.3), torch.tensor(expected))
    # heads of another number and width can be compared with it
    wide_q, wide_k = torch.randn(B, 2, N, 9).double(), torch.randn(B, 2, M, 9).double()
    other = np.einsum('bhid,bhjd->bhij', wide_q.numpy(), wide_k.numpy()).mean(1, keepdims=True)
    mask = pairs(rows(N), rows(M))
    kept = rows(N).numpy() & rows(M).numpy().transpose(0, 1, 3, 2)
    assert score_loss(mean_scores(q, k, 0.3), mean_scores(wide_q, wide_k, 1.0), mask).item() == pytest.approx(
        ((expected - other) ** 2)[kept].mean(), rel=1e-12
    )


# -- properties --------------------------------------------------------------------------------------------------------


def test_1_equal_matrices_give_exactly_zero_for_any_swap():
    teacher = [100 * x for x in matrices(dtype=torch.float32)]
    bias = torch.randn(1, H, N, M)
    for _ in range(10):
        assert attention_loss([x.clone() for x in teacher], teacher, bias).item() == 0
    assert value_loss(teacher[2].clone(), teacher[2]).item() == 0


def test_2_replacing_everything_leaves_nothing_to_learn_from_attention_but_from_values():
    student, teacher = matrices(), matrices()
    for x in student:
        x.requires_grad_()
    value = attention_loss(student, teacher, replace_prob=1.0)
    value.backward()
    assert value.item() == 0 and all((x.grad == 0).all() for x in student)
    value_loss(student[2], teacher[2]).backward()
    assert student[2].grad.abs().sum() > 0


def test_2_replacing_nothing_draws_nothing():
    state = torch.get_rng_state()
    attention_loss(matrices(), matrices(), replace_prob=0.0)
    x = torch.randn(3)
    assert swap(x, x + 1, 0.0) is x
    torch.set_rng_state(state)
    matrices(), matrices()
    assert torch.equal(torch.randn(3), x)


def test_3_half_of_the_elements_are_swapped_and_masks_differ_and_reproduce(monkeypatch):
    zeros, ones = torch.zeros(B, H, 64, 32), torch.ones(B, H, 64, 32)
    seen = []
    monkeypatch.setattr(cakd, 'attend', lambda q, k, v, bias: seen.append((q, k, v)) or q)

    def masks(prob=0.5):
        seen.clear()
        torch.manual_seed(1)
        attention_loss([zeros] * 3, [ones] * 3, replace_prob=prob)
        return seen[0]

    first = masks()
    deviation = 0.5 / math.sqrt(zeros.numel())
    for mask in first:
        assert set(mask.unique().tolist()) == {0, 1}  # whole elements, no mixture
        assert mask.mean().item() == pytest.approx(0.5, abs=4 * deviation)
    for a, b in ((0, 1), (0, 2), (1, 2)):  # independent draws agree on half of the elements
        assert (first[a] == first[b]).float().mean().item() == pytest.approx(0.5, abs=4 * deviation)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(), strict=True))
    assert masks(0.1)[0].mean().item() == pytest.approx(0.1, abs=4 * deviation)


def test_4_rotations_of_the_channels_are_not_seen():
    q, k, v = matrices()
    rotation, _ = torch.linalg.qr(torch.randn(D, D).double())
    teacher = matrices()
    torch.testing.assert_close(attend(q @ rotation, k @ rotation, v), attend(q, k, v))
    torch.testing.assert_close(value_loss(v @ rotation, teacher[2]), value_loss(v, teacher[2]))
    assert (attend(q @ rotation, k, v) - attend(q, k, v)).abs().max() > 1e-2


def test_5_outputs_are_convex_combinations_of_values():
    q, k, v = matrices()
    ones = torch.ones_like(v)
    torch.testing.assert_close(attend(q, k, ones), torch.ones(B, H, N, D).double())
    out = attend(10 * q, k, v)
    assert (out <= v.amax(2, keepdim=True) + 1e-12).all() and (out >= v.amin(2, keepdim=True) - 1e-12).all()


def test_5_a_single_token_attends_to_itself():
    q, k, v = matrices(1, 1)
    torch.testing.assert_close(attend(q, k, v), v)


def test_8_numbers_for_logits_of_zero():
    zero = torch.zeros(3, 5, 1)
    assert discriminator_loss(zero, zero).item() == pytest.approx(1.38629, abs=5e-6)
    assert 0.5 * discriminator_loss(zero, zero).item() == pytest.approx(0.69315, rel=1e-5)
    assert deception_loss(zero, 'saturating').item() == pytest.approx(-math.log(2), rel=1e-6)
    assert deception_loss(zero).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize('masked', [False, True])
def test_adversarial_losses_equal_numpy(masked):
    real, fake = 3 * torch.randn(2, 5, 1).double(), 3 * torch.randn(2, 5, 1).double()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()[..., None] if masked else None
    kept = mask.numpy() if masked else np.ones((2, 5, 1), bool)
    r, f = real.numpy(), fake.numpy()
    assert discriminator_loss(real, fake, mask).item() == pytest.approx((-log_expit(r) - log_expit(-f))[kept].mean())
    assert deception_loss(fake, mask=mask).item() == pytest.approx(-log_expit(f)[kept].mean())
    assert deception_loss(fake, 'saturating', mask).item() == pytest.approx(log_expit(-f)[kept].mean())


def test_both_forms_push_the_student_the_same_way():
    for form in ('saturating', 'non_saturating'):
        fake = torch.tensor([-5.0, 0.0, 5.0], requires_grad=True)
        deception_loss(fake, form).backward()
        assert (fake.grad < 0).all()


# -- gradients, precision, cost ----------------------------------------------------------------------------------------


def test_gradcheck():
    student, teacher = matrices(3, 2, 2), matrices(3, 2, 2)
    for x in student:
        x.requires_grad_()
    mask = rows(3)
    assert torch.autograd.gradcheck(lambda *s: attention_loss(s, teacher, None, 0.0, mask), student)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, teacher[2]), student[2])
    assert torch.autograd.gradcheck(
        lambda q, k: score_loss(mean_scores(q, k, 0.5), scores(*teacher[:2])[:, :1]), student[:2]
    )
    logits = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    for form in ('saturating', 'non_saturating'):
        assert torch.autograd.gradcheck(lambda x, form=form: deception_loss(x, form), logits)
    assert torch.autograd.gradcheck(discriminator_loss, (logits, (2 * logits).detach().requires_grad_()))


def test_teacher_gets_no_gradient():
    student, teacher = matrices(), matrices()
    for x in (*student, *teacher):
        x.requires_grad_()
    bias = torch.randn(1, H, N, M).double().requires_grad_()
    (attention_loss(student, teacher, bias) + value_loss(student[2], teacher[2])).backward()
    assert all(x.grad is None for x in (*teacher, bias)) and all(x.grad.abs().sum() > 0 for x in student)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_products_are_formed_in_fp32(dtype, autocast):
    """Values of a few hundred: their products overflow fp16, and bf16 would leave two digits."""
    student, teacher = ((200 * torch.randn(B, H, M, D)).to(dtype) for _ in range(2))
    q, k = torch.randn(2, B, H, M, D).to(dtype)
    expected_value = ((relations(student.double()) - relations(teacher.double())) ** 2).mean()
    expected = (
        (outputs(q.double(), k.double(), student.double()) - outputs(k.double(), q.double(), teacher.double())) ** 2
    ).mean()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        value = value_loss(student, teacher)
        attention = attention_loss((q, k, student), (k, q, teacher), replace_prob=0.0)
        mean = mean_scores(student, teacher, 1.0)
    assert value.dtype == attention.dtype == mean.dtype == torch.float32
    assert value.item() == pytest.approx(expected_value, rel=1e-5)
    assert attention.item() == pytest.approx(expected, rel=1e-4)
    assert mean.isfinite().all()


def test_does_not_wait_for_the_device():
    student, teacher = matrices(), matrices()
    for x in student:
        x.requires_grad_()
    with Waits() as waits:
        loss = attention_loss(student, teacher, None, 0.5, rows(N)) + value_loss(student[2], teacher[2], rows(M))
        loss.backward()
    assert waits.seen == []
