"""Maps of boxes against loops over pixels and boxes in float64, on padded batches of mixed aspect ratio."""

import math

import numpy as np
import pytest
import torch

from kd_dense.context import Context
from kd_dense.errors import ConfigError
from kd_dense.geometry.boxes import (
    BITS,
    boxes_of,
    gaussian_sum,
    gaussian_union,
    gaussians,
    heaviest,
    pad_boxes,
    scale_mask,
    spans,
    union,
)
from tests.helpers.dispatch import Operations

CANVAS = (64, 64)
#: True sizes on the canvas: square, wide, narrow.
SIZES = [(64, 64), (48, 64), (64, 40)]


def random_boxes(counts=(4, 0, 7), sizes=SIZES, seed=0, whole=True):
    """Per image ``[n, 4]``, inside the true image, of whole pixels if so wanted."""
    rng = np.random.default_rng(seed)
    boxes = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        corners = rng.uniform(0, 1, (count, 2, 2)) * [width, height]
        corners = np.sort(corners, axis=1)
        corners = np.concatenate([corners[:, 0], corners[:, 1]], axis=1)
        if whole:
            corners = np.round(corners)
            corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1)
        boxes.append(torch.tensor(corners.reshape(-1, 4)))
    return boxes


def covered_by_pixels(box, size, canvas=CANVAS):
    """Paint the pixels of a box, and ask for each cell whether it has a painted one."""
    pixels = np.zeros(canvas, bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    for y in range(y1, y2):
        for x in range(x1, x2):
            pixels[y, x] = True
    h, w = size
    rows, columns = canvas[0] // h, canvas[1] // w
    cells = np.zeros(size, bool)
    for i in range(h):
        for j in range(w):
            cells[i, j] = pixels[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].any()
    return cells


def spanned(boxes, size, canvas=CANVAS, overhang=0):
    return spans(*pad_boxes(boxes), canvas, size, overhang)


# -- padding of lists --------------------------------------------------------------------------------------------------


def test_lists_of_different_length():
    boxes = random_boxes()
    padded, real = pad_boxes(boxes)
    assert padded.shape == (3, 7, 4) and real.dtype == torch.bool
    assert real.sum(1).tolist() == [4, 0, 7]
    for own, row, flags in zip(boxes, padded, real, strict=True):
        assert torch.equal(row[flags], own)


def test_no_boxes_at_all():
    padded, real = pad_boxes([torch.zeros(0, 4), torch.zeros(0, 4)])
    assert padded.shape == (2, 1, 4) and not real.any()
    assert not union(*spans(padded, real, CANVAS, (8, 8))).any()
    assert (scale_mask(*spans(padded, real, CANVAS, (8, 8))) == 0).all()
    profiles = gaussians(padded, real, CANVAS, (8, 8), 0.25)
    assert (gaussian_sum(*profiles) == 0).all() and (gaussian_union(*profiles) == 0).all()


def test_a_task_without_boxes():
    with pytest.raises(ConfigError, match='Method needs ground-truth boxes, which this task has not; use FeatureMimic'):
        boxes_of(Context(CANVAS), 'Method')


# -- which cells a box covers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(8, 8), (16, 4), (1, 1), (64, 64)])
def test_cells_are_those_that_a_loop_over_pixels_paints(size):
    boxes = random_boxes()
    rows, columns = spanned(boxes, size)
    mask = union(rows, columns)
    assert mask.shape == (3, 1, *size)
    for i, own in enumerate(boxes):
        expected = np.zeros(size, bool)
        for j, box in enumerate(own):
            cells = covered_by_pixels(box, size)
            assert np.array_equal((rows[i, j][:, None] & columns[i, j][None]).numpy(), cells)
            expected |= cells
        assert np.array_equal(mask[i, 0].numpy(), expected)
    assert mask[0].any() and not mask[1].any()


def test_padding_does_not_move_a_box():
    """The cells of an image of 48 x 64 are the same alone and at the top of a canvas of 64 x 64."""
    boxes = random_boxes((5,), [(48, 64)], whole=False)
    alone = scale_mask(*spanned(boxes, (6, 8), (48, 64)))
    padded = scale_mask(*spanned(boxes, (8, 8)))
    torch.testing.assert_close(padded[:, :, :6], alone, rtol=0, atol=0)
    assert (padded[:, :, 6:] == 0).all() and alone.any()
    alone = gaussian_union(*gaussians(*pad_boxes(boxes), (48, 64), (6, 8), 0.25))
    padded = gaussian_union(*gaussians(*pad_boxes(boxes), CANVAS, (8, 8), 0.25))
    torch.testing.assert_close(padded[:, :, :6], alone)


def test_edges_of_cells():
    """Cells of 8 pixels: a box that ends on an edge does not reach into the next cell, the least beyond it does."""
    box = torch.tensor([[8.0, 16.0, 24.0, 24.0]])
    rows, columns = spanned([box], (8, 8))
    assert rows[0, 0].nonzero().flatten().tolist() == [2] and columns[0, 0].nonzero().flatten().tolist() == [1, 2]
    rows, columns = spanned([box + torch.tensor([-0.01, 0, 0.01, 0])], (8, 8))
    assert columns[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    rows, columns = spanned([torch.tensor([[9.0, 9.0, 9.5, 9.5]])], (8, 8))  # a small box has its cell
    assert rows.sum() == columns.sum() == 1


@pytest.mark.parametrize('whole', [True, False])
def test_an_overhang_of_one_is_the_rule_of_the_public_code(whole):
    """From the floor of the left to the ceiling of the right edge, both included, as far as the map reaches."""
    boxes = random_boxes(whole=whole)
    rows, columns = spanned(boxes, (8, 8), overhang=1)
    for i, own in enumerate(boxes):
        for j, box in enumerate(own.numpy() / 8):
            for found, low, high in ((columns, box[0], box[2]), (rows, box[1], box[3])):
                expected = [c for c in range(8) if math.floor(low) <= c <= math.ceil(high)]
                assert found[i, j].nonzero().flatten().tolist() == expected


# -- the smallest box of a cell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(8, 8), (16, 4)])
def test_scale_mask_equals_loops(size):
    boxes = random_boxes()
    mask = scale_mask(*spanned(boxes, size))
    for i, own in enumerate(boxes):
        expected = np.zeros(size)
        for box in own:
            cells = covered_by_pixels(box, size)
            expected = np.maximum(expected, cells / cells.sum())
        np.testing.assert_allclose(mask[i, 0].numpy(), expected, rtol=1e-6)


def test_every_box_weighs_one_where_they_do_not_overlap():
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 64.0, 64.0]])]
    mask = scale_mask(*spanned(boxes, (8, 8)))
    assert mask[0, 0, 0, 0] == 1 and mask[0, 0, 2:, 2:].sum() == pytest.approx(1)
    assert mask.sum() == pytest.approx(2)


@pytest.mark.parametrize('count', [1, 61, BITS, BITS + 1, 2 * BITS, 150])
def test_heaviest_of_any_number_of_boxes(count):
    rng = np.random.default_rng(count)
    rows, columns = rng.random((2, count, 9)) < 0.2, rng.random((2, count, 7)) < 0.2
    weights = rng.random((2, count)) + 0.01
    expected = np.zeros((2, 9, 7))
    for b in range(2):
        for n in range(count):
            expected[b] = np.maximum(expected[b], weights[b, n] * np.outer(rows[b, n], columns[b, n]))
    found = heaviest(*(torch.tensor(x) for x in (rows, columns, weights)))
    assert np.array_equal(found[:, 0].numpy(), expected)
    assert expected.any()


def test_heaviest_takes_little_memory():
    """No map for each box: the largest tensor is a number of 64 bits for every cell and 62 boxes."""
    rows = columns = torch.ones(1, 300, 64, dtype=torch.bool)
    weights = torch.rand(1, 300)
    largest = 0

    class Sizes(Operations):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = super().__torch_dispatch__(func, types, args, kwargs)
            for x in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel() * x.element_size())
            return result

    with Sizes():
        heaviest(rows, columns, weights)
    assert largest <= 5 * 64 * 64 * 8 < 300 * 64 * 64  # and not one byte for each box and cell


# -- bells -------------------------------------------------------------------------------------------------------------


def bell(box, size, sigma, canvas=CANVAS):
    """One bell of height 1 by a loop over cells."""
    h, w = size
    x1, y1, x2, y2 = (float(v) for v in box)
    x1, x2, y1, y2 = x1 * w / canvas[1], x2 * w / canvas[1], y1 * h / canvas[0], y2 * h / canvas[0]
    sx, sy = max(sigma * (x2 - x1), 0.5), max(sigma * (y2 - y1), 0.5)
    out = np.zeros(size)
    for i in range(h):
        for j in range(w):
            dx, dy = (j + 0.5 - (x1 + x2) / 2) / sx, (i + 0.5 - (y1 + y2) / 2) / sy
            out[i, j] = math.exp(-(dx * dx + dy * dy) / 2)
    return out


@pytest.mark.parametrize('size', [(8, 8), (16, 4)])
@pytest.mark.parametrize('sigma', [0.1, 0.25, 1.0])
def test_bells_equal_loops(size, sigma):
    boxes = random_boxes(whole=False)
    profiles = gaussians(*pad_boxes(boxes), CANVAS, size, sigma)
    total, cover = gaussian_sum(*profiles), gaussian_union(*profiles)
    for i, own in enumerate(boxes):
        bells = [bell(box, size, sigma) for box in own]
        np.testing.assert_allclose(
            total[i, 0], sum((b / b.sum() for b in bells), np.zeros(size)), rtol=1e-6, atol=1e-12
        )
        np.testing.assert_allclose(cover[i, 0], np.minimum(sum(bells, np.zeros(size)), 1), rtol=1e-6, atol=1e-12)


def test_a_bell_sums_to_one_and_has_fallen_to_exp_minus_two_at_the_edge():
    box = [torch.tensor([[16.0, 24.0, 48.0, 40.0]])]
    profiles = gaussians(*pad_boxes(box), CANVAS, (64, 64), 0.25)
    assert gaussian_sum(*profiles).sum() == pytest.approx(1, rel=1e-5)
    assert profiles[1][0, 0, 16] == pytest.approx(math.exp(-2), rel=0.15)  # the centre of the cell, half a pixel inside
    assert gaussian_union(*profiles).amax() == pytest.approx(1, abs=0.02)


def test_the_smallest_box_still_has_a_bell():
    box = [torch.tensor([[31.9, 31.9, 32.0, 32.0]])]
    profiles = gaussians(*pad_boxes(box), CANVAS, (8, 8), 0.25)
    assert gaussian_sum(*profiles).sum() == pytest.approx(1, rel=1e-5)
    assert gaussian_union(*profiles).amax() > 0.3


def test_under_autocast_bells_stay_in_fp32():
    boxes = [b.float() for b in random_boxes()]
    with torch.autocast('cpu', torch.bfloat16):
        inside = gaussian_sum(*gaussians(*pad_boxes(boxes), CANVAS, (8, 8), 0.25))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, gaussian_sum(*gaussians(*pad_boxes(boxes), CANVAS, (8, 8), 0.25)))


# -- no copies, no loop ------------------------------------------------------------------------------------------------


def everything(boxes):
    padded, real = pad_boxes(boxes)
    rows, columns = spans(padded, real, CANVAS, (8, 8))
    profiles = gaussians(padded, real, CANVAS, (8, 8), 0.25)
    return union(rows, columns), scale_mask(rows, columns), gaussian_sum(*profiles), gaussian_union(*profiles)


def test_operations_do_not_grow_with_the_boxes_and_none_waits():
    counts = []
    for count in (1, 50, 200):
        boxes = [b.float() for b in random_boxes((count, 0, count))]
        with Operations() as operations:
            everything(boxes)
        assert operations.seen == [] and operations.uploads == []
        counts.append(operations.counts)
    assert counts[0] == counts[1] == counts[2]


def test_nothing_depends_on_values():
    """Tensors without values have none that could be read."""
    boxes, real = pad_boxes([torch.empty(n, 4, device='meta') for n in (3, 0, 70)])
    mask, profiles = scale_mask(*spans(boxes, real, CANVAS, (8, 8))), gaussians(boxes, real, CANVAS, (8, 8), 0.25)
    assert mask.shape == (3, 1, 8, 8) and all(x.device.type == 'meta' for x in (mask, *profiles))
