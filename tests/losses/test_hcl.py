"""The hierarchical context loss against loops in float64, and its published properties."""

import math

import numpy as np
import pytest
import torch

from kd_dense.distillers import FeatureMimic
from kd_dense.losses import hcl
from tests.helpers.toys import nothing_masked, probe
from tests.helpers.waits import Waits


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def some_mask(b, h, w):
    """Deterministic, of both values in every image; the first rows of the first image are all invalid."""
    mask = torch.arange(b * h * w).reshape(b, 1, h, w) % 3 != 0
    mask[0, :, : h // 2] = False
    return mask


def bins(size, cells):
    """First and last place of every cell of adaptive average pooling."""
    return [(math.floor(i * size / cells), math.ceil((i + 1) * size / cells)) for i in range(cells)]


def loops(student, teacher, mask=None, levels=(4, 2, 1)):
    """Pools both maps on their own, over the valid places of every cell."""
    s, t = student.detach().double().numpy(), teacher.detach().double().numpy()
    b_, c_, h, w = s.shape
    valid = np.ones((b_, 1, h, w), bool) if mask is None else mask.numpy()
    weights = [(h, 1.0)] + [(cells, 0.5 ** (i + 1)) for i, cells in enumerate(x for x in levels if x < h)]
    total = 0.0
    for cells, weight in weights:
        rows = [(i, i + 1) for i in range(h)] if weight == 1 else bins(h, cells)
        columns = [(i, i + 1) for i in range(w)] if weight == 1 else bins(w, cells)
        squares = []
        for b in range(b_):
            for y0, y1 in rows:
                for x0, x1 in columns:
                    inside = valid[b, 0, y0:y1, x0:x1]
                    for c in range(c_ if inside.any() else 0):
                        pooled = [a[b, c, y0:y1, x0:x1][inside].mean() for a in (s, t)]
                        squares.append((pooled[0] - pooled[1]) ** 2)
        total += weight * np.mean(squares)
    return total / sum(weight for _, weight in weights)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('size', [(8, 12), (9, 13), (5, 7), (4, 4), (3, 5), (2, 6), (1, 4), (8, 2)])
def test_equals_loops(size, masked):
    student, teacher = maps(2, 3, *size)
    mask = some_mask(2, *size) if masked else None
    assert hcl(student, teacher, mask).item() == pytest.approx(loops(student, teacher, mask), rel=1e-12)


def test_other_levels():
    student, teacher = maps(2, 3, 9, 8)
    value = hcl(student, teacher, levels=(6, 3))
    assert value.item() == pytest.approx(loops(student, teacher, levels=(6, 3)), rel=1e-12)


def test_property_1_equal_maps_give_exactly_zero():
    x = torch.randn(2, 3, 9, 13)
    assert hcl(x, x.clone()).item() == 0


@pytest.mark.parametrize('offset', [0.5, -3.0])
def test_property_2_a_constant_offset_counts_squared_on_every_stage(offset):
    stages = [torch.randn(2, 3, *size, dtype=torch.float64) for size in ((16, 32), (8, 16), (4, 8), (2, 4))]
    assert sum(hcl(x, x + offset) for x in stages).item() == pytest.approx(4 * offset**2, rel=1e-12)


def test_property_2_scales_with_the_square():
    student, teacher = maps(2, 3, 8, 12)
    assert hcl(7 * student, 7 * teacher).item() == pytest.approx(49 * hcl(student, teacher).item(), rel=1e-12)


def test_property_3_a_checkerboard_is_seen_at_full_resolution_only():
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).double()[None, None]
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert hcl(x + board, x).item() == pytest.approx(1 / 1.875, rel=1e-12)


@pytest.mark.parametrize('height, divisor', [(1, 1), (2, 1.5), (3, 1.75), (4, 1.75), (5, 1.875), (8, 1.875)])
@pytest.mark.parametrize('width', [2, 16])
def test_property_4_the_height_decides_on_the_levels(height, width, divisor):
    """A residual that no level but the full one sees: +1 and -1 side by side in every cell of every level."""
    x = torch.ones(1, 2, height, width, dtype=torch.float64)
    x[:, 1] = 0
    # the mean over a cell is the same everywhere, and so is its square: only the divisor's sum of weights cancels
    assert hcl(x, torch.zeros_like(x)).item() == pytest.approx(0.5, rel=1e-12)
    if width == 16:  # four columns in each cell of 4: the alternation vanishes from all of them
        board = (torch.arange(width) % 2 * 2.0 - 1).double().expand(1, 1, height, width)
        assert hcl(board, torch.zeros_like(board)).item() == pytest.approx(1 / divisor, rel=1e-12)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('size', [(8, 4), (5, 3)])
def test_gradcheck(size, masked):
    student, teacher = maps(2, 2, *size)
    mask = some_mask(2, *size) if masked else None
    assert torch.autograd.gradcheck(lambda s: hcl(s, teacher, mask), student.requires_grad_())


def test_gradient_goes_to_the_student_only():
    student, teacher = (x.requires_grad_() for x in maps(2, 3, 8, 8))
    hcl(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_fp32(dtype):
    student, teacher = (300 * x.to(dtype) for x in maps(2, 4, 32, 32))  # squares overflow fp16
    value = hcl(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loops(student, teacher), rel=1e-5)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_what_lies_outside_the_mask_does_not_matter(bad):
    student, teacher = maps(2, 3, 8, 12)
    mask = some_mask(2, 8, 12)
    expected = loops(student, teacher, mask)
    outside = ~mask.expand_as(student)
    student[outside] = bad
    teacher[outside] = bad
    value = hcl(student.requires_grad_(), teacher, mask)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad.isfinite().all() and (student.grad[outside] == 0).all() and student.grad.abs().sum() > 0


def test_full_and_empty_masks():
    student, teacher = maps(2, 3, 5, 7)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    torch.testing.assert_close(hcl(student, teacher, mask), hcl(student, teacher))
    value = hcl(student.requires_grad_(), teacher, ~mask)
    value.backward()
    assert value.item() == 0 and (student.grad == 0).all()


def test_does_not_wait_for_the_device():
    student, teacher = (x.float() for x in maps(2, 3, 8, 12))
    student.requires_grad_()
    with Waits() as waits:
        hcl(student, teacher, some_mask(2, 8, 12)).backward()
    assert waits.seen == []


def test_is_a_loss_of_feature_mimic():
    student, teacher = maps(2, 3, 8, 12)
    method = FeatureMimic('backbone:3', loss='hcl')
    method.setup(probe('features', (2, 3, 8, 12)), probe('features', (2, 3, 8, 12)))
    value = method({'features': [student]}, {'features': [teacher]}, nothing_masked())['loss']
    assert value.item() == pytest.approx(loops(student, teacher), rel=1e-12)
