"""Pooled embeddings: RoIs against torchvision's RoIAlign, the others against loops over pixels."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from kd_dense.geometry.regions import _octave, class_tokens, grid_tokens, image_tokens, roi_tokens
from tests.helpers.dispatch import Operations

CANVAS = (256, 384)


def pyramid(octaves=(3, 4, 5), batch=2, channels=3, canvas=CANVAS):
    sizes = [tuple(-(-n // 2**k) for n in canvas) for k in octaves]
    return [torch.randn(batch, channels, *size, dtype=torch.float64) for size in sizes]


def boxes(*counts, canvas=CANVAS):
    found = []
    for count in counts:
        corner = torch.rand(count, 2) * torch.tensor([canvas[1] * 0.8, canvas[0] * 0.8])
        found.append(torch.cat([corner, corner + torch.rand(count, 2) ** 2 * torch.tensor(canvas[::-1]) + 1], 1))
    return found


def aligned(levels, own, octaves, canvas):
    """RoIAlign at the level that the rule of feature pyramids gives, box by box; the mean over its bins."""
    found = []
    for image, one in enumerate(own):
        tokens = []
        for box in one.double():
            area = (box[2] - box[0]) * (box[3] - box[1])
            wanted = int(np.floor(4 + np.log2(np.sqrt(float(area)) / 224)))
            x = levels[octaves.index(min(max(wanted, min(octaves)), max(octaves)))]
            scale = torch.tensor([x.shape[3] / canvas[1], x.shape[2] / canvas[0]] * 2, dtype=torch.float64)
            roi = torch.cat([torch.tensor([float(image)], dtype=torch.float64), box * scale])[None]
            tokens.append(roi_align(x, roi, 7, sampling_ratio=2, aligned=True).mean((2, 3))[0])
        found.append(torch.stack(tokens) if tokens else x.new_zeros(0, levels[0].shape[1]))
    return found


@pytest.mark.parametrize('canvas', [CANVAS, (250, 390)])  # the second: coarse cells are rounded up
@pytest.mark.parametrize('octaves', [(3, 4, 5), (5, 3, 4), (4,)])
def test_boxes_equal_roi_align_at_their_level(octaves, canvas):
    levels, own = pyramid(octaves, canvas=canvas), boxes(9, 4, canvas=canvas)
    own[0][0] = torch.tensor([-30.0, -20.0, 20.0, 10.0])  # in part outside
    own[0][1] = torch.tensor([300.0, 200.0, 500.0, 300.0])
    own[1][0] = torch.tensor([400.0, 300.0, 500.0, 400.0])  # altogether
    pooled = roi_tokens(levels, own, octaves, canvas)
    for value, expected in zip(pooled, aligned(levels, own, octaves, canvas), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert (pooled[1][0] == 0).all() and pooled[1][1].abs().min() > 0


def test_the_level_rule():
    sides = torch.tensor([7.0, 27.9, 28.0, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 896.0])
    square = torch.stack([torch.zeros(11), torch.zeros(11), sides, sides], 1)
    assert _octave(square).tolist() == [-1, 0, 1, 2, 2, 3, 3, 4, 4, 5, 6]
    # each box sees the level of its octave only, the outermost levels see what lies beyond, a gap goes to the finer one
    for octaves, expected in (((3, 4, 5), [3, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5]), ((2, 5), [2] * 9 + [5, 5])):
        levels = [torch.full((1, 1, 8, 8), float(k)) for k in octaves]
        (tokens,) = roi_tokens(levels, [square], octaves, (1000, 1000))
        assert tokens.flatten().round(decimals=4).tolist() == expected


def test_a_box_without_area_has_the_feature_at_its_place():
    (x,) = pyramid((3,))
    (first, _) = roi_tokens([x], [torch.tensor([[20.0, 28.0, 20.0, 28.0]]), torch.zeros(0, 4)], (3,), CANVAS)
    torch.testing.assert_close(first[0], x[0, :, 3, 2])  # the centre of cell (3, 2)


def test_gradient_of_boxes_goes_where_they_are():
    levels = [x.requires_grad_() for x in pyramid()]
    own = [torch.tensor([[64.0, 64.0, 128.0, 128.0]]), torch.zeros(0, 4)]
    sum(t.sum() for t in roi_tokens(levels, own, (3, 4, 5), CANVAS)).backward()
    inside = levels[0].grad[0, 0] != 0
    assert inside[8:16, 8:16].all() and inside.sum() == 100  # interpolation reaches half a cell beyond
    assert (levels[0].grad[1] == 0).all() and all((x.grad == 0).all() for x in levels[1:])
    assert levels[0].grad.sum().item() == pytest.approx(3, rel=1e-6)


def test_no_boxes_at_all():
    levels = [x.requires_grad_() for x in pyramid()]
    tokens = roi_tokens(levels, boxes(0, 0), (3, 4, 5), CANVAS)
    assert [t.shape for t in tokens] == [(0, 3), (0, 3)]
    torch.cat(tokens).sum().backward()
    assert all((x.grad == 0).all() for x in levels)


def test_boxes_need_no_loop_and_no_copy():
    totals = []
    for count in (1, 50):
        levels, own = [x.requires_grad_() for x in pyramid()], boxes(count, 1)
        with Operations() as operations:
            torch.cat(roi_tokens(levels, own, (3, 4, 5), CANVAS)).square().sum().backward()
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]


def test_half_precision_is_pooled_in_more():
    levels, own = pyramid(), boxes(3, 2)
    half = roi_tokens([x.bfloat16() for x in levels], own, (3, 4, 5), CANVAS)
    exact = roi_tokens([x.bfloat16().double() for x in levels], own, (3, 4, 5), CANVAS)
    with torch.autocast('cpu', torch.bfloat16):
        auto = roi_tokens([x.bfloat16() for x in levels], own, (3, 4, 5), CANVAS)
    for h, a, e in zip(half, auto, exact, strict=True):
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.double(), e, rtol=1e-5, atol=1e-5)
        assert torch.equal(a, h)


def test_classes():
    x, labels = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randint(0, 5, (2, 4, 6))
    labels[0][labels[0] == 2] = 0
    labels[1, :2] = 255
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for given in (labels, large):
        tokens, present = class_tokens(x, given, 5)
        assert tokens.shape == (2, 5, 3)
        for b in range(2):
            for c in range(5):
                cells = [x[b, :, i, j].numpy() for i in range(4) for j in range(6) if labels[b, i, j] == c]
                assert present[b, c] == bool(cells)
                np.testing.assert_allclose(tokens[b, c], np.mean(cells, 0) if cells else 0, rtol=1e-9, atol=1e-12)
    assert not present[0, 2] and present[1].any()
    with Operations() as operations:
        class_tokens(x, large, 5)
    assert operations.seen == [] and operations.uploads == []


def test_labels_are_read_under_the_centres_of_cells():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 2, 2] = 1  # the pixel under the centre of a single cell
    tokens, present = class_tokens(torch.full((1, 1, 1, 1), 7.0), labels, 2)
    assert present.tolist() == [[False, True]] and tokens.flatten().tolist() == [0, 7]


def test_grid():
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    mask = torch.ones(2, 1, 6, 8, dtype=torch.bool)
    mask[0, :, 3:], mask[1, :, :2, 1:] = False, False
    x[0, :, 3:] = torch.inf
    tokens, valid = grid_tokens(x, 2, mask)
    for b in range(2):
        for n, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            block = (slice(3 * i, 3 * i + 3), slice(4 * j, 4 * j + 4))
            kept = mask[b, 0][block].numpy()
            assert valid[b, n] == kept.any()
            expected = x[b][(slice(None), *block)].numpy()[:, kept].mean(1) if kept.any() else 0
            np.testing.assert_allclose(tokens[b, n], expected, rtol=1e-9)
    assert valid.tolist() == [[True, True, False, False], [True] * 4]
    tokens, valid = grid_tokens(x[1:], 7)  # fewer rows than cells: the map's own
    assert tokens.shape == (1, 6 * 7, 3) and valid is None


def test_images():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 6) < 0.5
    tokens, valid = image_tokens(x)
    torch.testing.assert_close(tokens, x.flatten(2).mean(2))
    assert valid.all()
    expected = torch.stack([x[b][:, mask[b, 0]].mean(1) for b in range(2)])
    x = torch.where(mask, x, torch.nan)
    torch.testing.assert_close(image_tokens(x, mask)[0], expected)
    mask[1] = False
    tokens, valid = image_tokens(x, mask)
    torch.testing.assert_close(tokens[0], expected[0])
    assert (tokens[1] == 0).all() and valid.tolist() == [True, False]
