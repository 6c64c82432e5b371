"""Feature distances against NumPy in float64 and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_dense.connectors import Conv1x1
from kd_dense.errors import ConfigError
from kd_dense.losses import cosine, l1, mse, normalized_mse, score_weighted_mse
from kd_dense.losses.feature import AXES
from tests.helpers.waits import Waits

PLAIN = [mse, l1, cosine]


def maps(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape, dtype=torch.float64), 3 * torch.randn(*shape, dtype=torch.float64) + 1


def checkered(b: int, h: int, w: int) -> torch.Tensor:
    mask = torch.ones(b, 1, h, w, dtype=torch.bool)
    for i in range(b):
        mask[i, 0, : i + 1, ::2] = False
    return mask


def plain_loops(loss, student, teacher, mask=None):
    s, t = student.numpy(), teacher.numpy()
    values = []
    for b in range(s.shape[0]):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                if mask is not None and not mask[b, 0, y, x]:
                    continue
                u, v = s[b, :, y, x], t[b, :, y, x]
                if loss is mse:
                    values.extend((u - v) ** 2)
                elif loss is l1:
                    values.extend(abs(u - v))
                else:
                    values.append(1 - u @ v / math.sqrt((u @ u) * (v @ v)))
    return np.mean(values)


def standardized_loops(x, axes, eps, mask):
    """Standardise a float64 array cell by cell of the group it belongs to."""
    b_, c_, h, w = x.shape
    valid = np.ones((b_, 1, h, w), bool) if mask is None else mask.numpy()
    out = np.zeros_like(x)
    groups = {}
    for b in range(b_):
        for c in range(c_):
            for y in range(h):
                for z in range(w):
                    if valid[b, 0, y, z]:
                        group = {'hw': (b, c), 'c': (b, y, z), 'chw': (b,), 'bhw': (c,)}[axes]
                        groups.setdefault(group, []).append((b, c, y, z))
    for places in groups.values():
        values = np.array([x[p] for p in places])
        mean = values.mean()
        variance = ((values - mean) ** 2).mean()
        for p, v in zip(places, values):
            out[p] = (v - mean) / math.sqrt(variance + eps)
    return out, np.broadcast_to(valid, x.shape)


def normalized_loops(student, teacher, axes, eps=1e-5, mask=None):
    s, valid = standardized_loops(student.numpy(), axes, eps, mask)
    t, _ = standardized_loops(teacher.numpy(), axes, eps, mask)
    return ((s - t) ** 2)[valid].mean()


# -- mse, l1, cosine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('loss', PLAIN)
def test_equals_loops(loss, masked):
    student, teacher = maps(2, 3, 4, 5)
    mask = checkered(2, 4, 5) if masked else None
    assert loss(student, teacher, mask).item() == pytest.approx(plain_loops(loss, student, teacher, mask), rel=1e-12)


def test_worked_numbers():
    student, teacher = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1)
    assert mse(student, teacher).item() == 1
    assert l1(student, teacher).item() == 1
    assert cosine(student, teacher).item() == pytest.approx(1 - 24 / 25)
    assert cosine(student, -student).item() == pytest.approx(2)
    assert mse(student, torch.zeros_like(student)).item() == 12.5


def test_cosine_ignores_positive_scale():
    student, teacher = maps(2, 3, 4, 5)
    torch.testing.assert_close(cosine(7 * student, 0.1 * teacher), cosine(student, teacher))


@pytest.mark.parametrize('loss', [*PLAIN, normalized_mse])
def test_equal_inputs_give_zero(loss):
    x = torch.randn(2, 3, 4, 5)
    assert loss(x, x.clone()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('loss', PLAIN)
def test_half_precision_is_reduced_in_fp32(loss, dtype):
    # 300^2 overflows fp16, and the sum of this many terms overflows or stalls in both
    student, teacher = (300 * x.to(dtype) for x in maps(2, 4, 32, 32))
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(plain_loops(loss, student.double(), teacher.double()), rel=1e-5)


@pytest.mark.parametrize('loss', PLAIN)
def test_empty_mask(loss):
    student, teacher = (x.float() for x in maps(2, 3, 4, 5))
    student.requires_grad_()
    value = loss(student, teacher, torch.zeros(2, 1, 4, 5, dtype=torch.bool))
    value.backward()
    assert value == 0 and (student.grad == 0).all()


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('loss, axes', [*((loss, None) for loss in PLAIN), *((normalized_mse, axes) for axes in AXES)])
def test_what_lies_outside_the_mask_does_not_matter(loss, axes, bad):
    student, teacher = maps(2, 3, 4, 5)
    mask = checkered(2, 4, 5)
    if axes is None:
        arguments, expected = {}, plain_loops(loss, student, teacher, mask)
    else:
        arguments, expected = {'axes': axes}, normalized_loops(student, teacher, axes, mask=mask)
    outside = ~mask.expand_as(student)
    student[outside] = bad
    teacher[outside] = bad
    student.requires_grad_()
    value = loss(student, teacher, mask=mask, **arguments)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad.isfinite().all() and (student.grad[outside] == 0).all()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('loss', [*PLAIN, normalized_mse])
def test_gradcheck(loss, masked):
    student, teacher = maps(2, 3, 2, 4)
    mask = checkered(2, 2, 4) if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask=mask), student.requires_grad_())


@pytest.mark.parametrize('loss', [*PLAIN, normalized_mse])
def test_teacher_gets_no_gradient(loss):
    student, teacher = (x.requires_grad_() for x in maps(2, 3, 4, 5))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize('loss', [*PLAIN, normalized_mse])
def test_does_not_wait_for_the_device(loss):
    student, teacher = maps(2, 3, 4, 6)
    mask = checkered(2, 4, 6)
    student.requires_grad_()
    with Waits() as waits:
        loss(student, teacher, mask=mask).backward()
    assert waits.seen == []


# -- normalised distance: the properties of normalised feature distillation --------------------------------------------


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('axes', list(AXES))
def test_normalized_equals_loops(axes, masked):
    student, teacher = maps(2, 3, 4, 5)
    mask = checkered(2, 4, 5) if masked else None
    expected = normalized_loops(student, teacher, axes, mask=mask)
    assert normalized_mse(student, teacher, axes, mask=mask).item() == pytest.approx(expected, rel=1e-12)
    in_fp32 = normalized_mse(student.float(), teacher.float(), axes, mask=mask)
    assert in_fp32.item() == pytest.approx(expected, rel=2e-5)


def test_normalized_full_mask_is_no_mask():
    student, teacher = maps(2, 3, 4, 5)
    full = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    for axes in AXES:
        torch.testing.assert_close(
            normalized_mse(student, teacher, axes, mask=full), normalized_mse(student, teacher, axes)
        )


def test_normalized_1_equal_maps_give_exactly_zero():
    x = 100 * torch.randn(2, 3, 8, 8) + 5
    assert normalized_mse(x, x.clone()).item() == 0


def test_normalized_2_positive_affine_maps_of_either_side_change_nothing():
    student, teacher = maps(2, 3, 8, 8)
    scale, offset = torch.rand(2, 3, 1, 1).double() + 0.5, torch.randn(2, 3, 1, 1).double()
    exact = normalized_mse(student, teacher, eps=0)
    torch.testing.assert_close(normalized_mse(student, scale * teacher + offset, eps=0), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(normalized_mse(scale * student + offset, teacher, eps=0), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(normalized_mse(student, scale * teacher + offset), exact, rtol=1e-4, atol=0)
    # the closer the variance comes to eps, the less it holds
    small = normalized_mse(student, 1e-3 * teacher)
    assert abs(small / exact - 1) > 1e-2


def test_normalized_3_opposite_maps_give_four():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert normalized_mse(x, -x, eps=0).item() == pytest.approx(4, rel=1e-12)
    for _ in range(20):
        student, teacher = maps(1, 2, 2, 2)
        assert 0 <= normalized_mse(student, teacher).item() <= 4


def test_normalized_4_is_two_minus_twice_the_correlation():
    student, teacher = maps(2, 3, 8, 8)
    r = [np.corrcoef(student[b, c].flatten(), teacher[b, c].flatten())[0, 1] for b in range(2) for c in range(3)]
    assert normalized_mse(student, teacher, eps=0).item() == pytest.approx(2 * (1 - np.mean(r)), rel=1e-12)


def test_normalized_4_is_twice_pkd_for_one_image():
    # PKD standardises over (N, H, W) with the unbiased deviation plus 1e-6 and halves the mean square.
    student, teacher = maps(1, 3, 8, 8)
    s, t = (
        ((x - x.mean((0, 2, 3), True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6)).numpy() for x in (student, teacher)
    )
    pkd = ((s - t) ** 2).mean() / 2
    unbiased = 63 / 64
    assert normalized_mse(student, teacher, eps=0).item() * unbiased == pytest.approx(2 * pkd, rel=1e-5)


def test_normalized_5_unrelated_maps_give_about_two():
    student, teacher = maps(4, 32, 32, 32)
    # the mean correlation of 128 pairs of 1024 samples has the standard deviation 1 / sqrt(128 * 1024) = 0.0028
    assert normalized_mse(student, teacher).item() == pytest.approx(2, abs=4 * 2 * 0.0028)


def test_normalized_6_is_the_distance_after_instance_norm():
    student, teacher = maps(2, 3, 8, 8)
    norm = torch.nn.InstanceNorm2d(3, eps=1e-5, affine=False)
    torch.testing.assert_close(normalized_mse(student, teacher), F.mse_loss(norm(student), norm(teacher)))


def test_normalized_7_common_permutations_change_nothing():
    student, teacher = maps(2, 5, 4, 6)
    value = normalized_mse(student, teacher)
    places, channels = torch.randperm(24), torch.randperm(5)

    def shuffled(x):
        return x.flatten(2)[:, :, places].reshape(x.shape)[:, channels]

    torch.testing.assert_close(normalized_mse(shuffled(student), shuffled(teacher)), value)
    assert abs(normalized_mse(shuffled(student), teacher) - value) > 1e-2


def test_normalized_8_gradient_has_no_offset_and_no_scale_part():
    student, teacher = maps(2, 3, 8, 8)
    student.requires_grad_()
    normalized_mse(student, teacher, eps=0).backward()
    gradient, x = student.grad.numpy(), student.detach().numpy()
    size = abs(gradient).sum()
    assert abs(gradient.sum((2, 3))).max() < 1e-12 * size
    centred = x - x.mean((2, 3), keepdims=True)
    assert abs((gradient * centred).sum((2, 3))).max() < 1e-12 * size


def test_normalized_8_connector_bias_gets_no_gradient_and_row_scale_does_not_matter():
    student, teacher = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 5, 8, 8, dtype=torch.float64)
    connector = Conv1x1(3, 5).double()
    value = normalized_mse(connector(student), teacher, eps=0)
    value.backward()
    assert connector.bias.grad.abs().max() < 1e-12 * connector.weight.grad.abs().max()
    with torch.no_grad():
        connector.weight *= torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(normalized_mse(connector(student), teacher, eps=0), value)


@pytest.mark.parametrize('axes', list(AXES))
@pytest.mark.parametrize('zero', ['student', 'teacher', 'both'])
def test_normalized_9_constant_maps_are_finite(zero, axes):
    student, teacher = (x.float() for x in maps(2, 3, 4, 4))
    if zero in ('student', 'both'):
        student = torch.zeros_like(student)
    if zero in ('teacher', 'both'):
        teacher = torch.zeros_like(teacher)
    student.requires_grad_()
    value = normalized_mse(student, teacher, axes)
    value.backward()
    assert student.grad.isfinite().all()
    # a standardised map has variance 1 and a constant one is 0 everywhere
    assert value.item() == pytest.approx(0 if zero == 'both' else 1, abs=1e-4)


def test_normalized_9_constant_teacher_channel_gives_no_gradient():
    student, teacher = maps(1, 2, 8, 8)
    teacher[:, 0] = 3
    student.requires_grad_()
    normalized_mse(student, teacher).backward()
    assert student.grad[:, 0].abs().max() < 1e-4 * student.grad[:, 1].abs().max()


def test_normalized_11_batch_is_the_mean_of_its_images():
    student, teacher = maps(3, 2, 8, 8)
    single = [normalized_mse(student[i : i + 1], teacher[i : i + 1]).item() for i in range(3)]
    assert normalized_mse(student, teacher).item() == pytest.approx(np.mean(single), rel=1e-12)
    # over the batch it is not
    single = [normalized_mse(student[i : i + 1], teacher[i : i + 1], 'bhw').item() for i in range(3)]
    assert abs(normalized_mse(student, teacher, 'bhw').item() - np.mean(single)) > 1e-4


def test_normalized_rejects_single_cells_and_unknown_axes():
    x = torch.randn(2, 3, 1, 1)
    with pytest.raises(ConfigError, match='more than one cell'):
        normalized_mse(x, x)
    with pytest.raises(ConfigError, match="one of .*'hw'.*not 'wh'"):
        normalized_mse(x, x, axes='wh')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_normalized_half_precision_is_reduced_in_fp32(dtype):
    student, teacher = (300 * x.to(dtype) for x in maps(2, 3, 16, 16))
    value = normalized_mse(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(normalized_loops(student.double(), teacher.double(), 'hw'), rel=1e-4)


# -- score-weighted distance -------------------------------------------------------------------------------------------


def test_score_weighted_equals_loops():
    student, teacher = maps(2, 3, 4, 5)
    score = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    above, below = 0.0, 1e-9
    for b in range(2):
        for y in range(4):
            for x in range(5):
                s = score[b, 0, y, x].item()
                above += s * ((student[b, :, y, x] - teacher[b, :, y, x]).numpy() ** 2).sum()
                below += 3 * s
    assert score_weighted_mse(student, teacher, score).item() == pytest.approx(above / below, rel=1e-12)


def test_score_weighted_limits():
    student, teacher = (x.float() for x in maps(2, 3, 4, 5))
    ones = torch.ones(2, 1, 4, 5)
    torch.testing.assert_close(score_weighted_mse(student, teacher, ones), F.mse_loss(student, teacher))
    torch.testing.assert_close(score_weighted_mse(student, teacher, 0.01 * ones), F.mse_loss(student, teacher))
    one_cell = torch.zeros(2, 1, 4, 5)
    one_cell[1, 0, 2, 3] = 0.7
    expected = F.mse_loss(student[1, :, 2, 3], teacher[1, :, 2, 3])
    torch.testing.assert_close(score_weighted_mse(student, teacher, one_cell), expected)
    student.requires_grad_()
    value = score_weighted_mse(student, teacher, 0 * ones)
    value.backward()
    assert value == 0 and (student.grad == 0).all()


def test_score_weighted_gradient_goes_to_the_student_only():
    student, teacher = (x.requires_grad_() for x in maps(2, 3, 2, 4))
    score = torch.rand(2, 1, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: score_weighted_mse(s, teacher, score), student)
    score_weighted_mse(student, teacher, score).backward()
    assert teacher.grad is None and score.grad is None


def test_score_weighted_half_precision_is_reduced_in_fp32():
    student, teacher = (300 * x.half() for x in maps(2, 4, 32, 32))
    score = torch.rand(2, 1, 32, 32).half()
    s, t, w = (x.double().numpy() for x in (student, teacher, score))
    value = score_weighted_mse(student, teacher, score)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((w * (s - t) ** 2).sum() / (4 * w.sum()), rel=1e-5)
