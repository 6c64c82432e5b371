"""Selection of pseudo boxes against loops, and their way into another view and back."""

import math

import numpy as np
import pytest
import torch

from kd_dense.adaptation import artificial_box, between_views, select_boxes, warp_boxes, warp_pseudo_boxes
from kd_dense.adaptation.pseudo_boxes import PseudoBoxes
from kd_dense.errors import ConfigError


def predictions(n=200, classes=4, dtype=torch.float32):
    corner, side = torch.rand(n, 2) * 80, torch.rand(n, 2) * 40 + 2
    return torch.cat([corner, corner + side], 1).to(dtype), torch.rand(n).to(dtype), torch.randint(classes, (n,))


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height)


def selected_by_loops(boxes, scores, labels, thresholds, iou_threshold, max_count):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        better = (j for j in kept if labels[j] == labels[i])
        if scores[i] > thresholds[labels[i]] and all(iou(boxes[i], boxes[j]) <= iou_threshold for j in better):
            kept.append(i)
    return kept[:max_count]


@pytest.mark.parametrize('threshold', [0.5, (0.2, 0.5, 0.8, 1.0)])
@pytest.mark.parametrize('max_count', [5, 1000])
def test_selection_equals_loops(threshold, max_count):
    boxes, scores, labels = predictions()
    each = [threshold] * 4 if isinstance(threshold, float) else threshold
    expected = selected_by_loops(boxes.tolist(), scores.tolist(), labels.tolist(), each, 0.3, max_count)
    found = select_boxes(boxes, scores, labels, threshold, 0.3, max_count)
    assert len(found) == len(expected) > 0
    assert torch.equal(found.boxes, boxes[expected]) and torch.equal(found.scores, scores[expected])
    assert torch.equal(found.labels, labels[expected]) and torch.equal(found.weights, torch.ones(len(expected)))
    on_device = select_boxes(boxes, scores, labels, torch.tensor(each), 0.3, max_count)
    assert torch.equal(on_device.boxes, found.boxes)


def test_defaults_keep_the_promises_of_the_method():
    boxes, scores, labels = predictions(2000)
    found = select_boxes(boxes, scores, labels)
    assert len(found) == 20 and (found.scores > 0.5).all() and (found.scores.diff() <= 0).all()
    for i in range(20):
        for j in range(i):
            assert found.labels[i] != found.labels[j] or iou(found.boxes[i].tolist(), found.boxes[j].tolist()) <= 0.3


def test_a_score_at_the_threshold_or_not_a_number_does_not_pass():
    boxes, _, labels = predictions(4)
    boxes += torch.arange(4)[:, None] * 1000  # no two overlap
    found = select_boxes(boxes, torch.tensor([0.5, 0.500001, math.nan, 0.9]), labels)
    assert torch.equal(found.boxes, boxes[[3, 1]])


def test_classes_do_not_suppress_each_other():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(3, 1)
    found = select_boxes(box, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]))
    assert found.labels.tolist() == [0, 1] and found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_soft_weights():
    boxes, scores, labels = predictions()
    found = select_boxes(boxes, scores, labels, weighting='score')
    assert torch.equal(found.weights, found.scores) and len(found) > 3


@pytest.mark.parametrize('n', [0, 5])
def test_nothing_passes(n):
    boxes, scores, labels = predictions(n)
    found = select_boxes(boxes, scores * 0.5, labels, (0.5,) * 4)
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.labels.dtype == torch.long
    assert len(warp_pseudo_boxes(found, np.eye(3), (10, 10))) == 0


def test_no_gradient_and_half_precision():
    boxes, scores, labels = predictions(dtype=torch.bfloat16)
    found = select_boxes(boxes, scores.requires_grad_(), labels)
    assert not found.scores.requires_grad and found.boxes.dtype == torch.bfloat16 and len(found) > 0


def view(scale=1.0, shift=(0.0, 0.0), flip=None, angle=0.0):
    """A matrix as MMDetection's transforms make it; ``flip``: the width of what is flipped."""
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
    matrix = np.diag([scale, scale, 1]).astype(np.float32) @ matrix
    if flip is not None:
        matrix = np.array([[-1, 0, flip], [0, 1, 0], [0, 0, 1]], np.float32) @ matrix
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]], np.float32) @ matrix


def test_worked_boxes():
    boxes = torch.tensor([[1.0, 2.0, 5.0, 4.0]])
    assert warp_boxes(boxes, view(2.0)).tolist() == [[2, 4, 10, 8]]
    assert warp_boxes(boxes, view(flip=20.0)).tolist() == [[15, 2, 19, 4]]
    assert warp_boxes(boxes, view(shift=(-3, 10)), (12, 9)).tolist() == [[0, 12, 2, 12]]
    torch.testing.assert_close(warp_boxes(boxes, view(angle=math.pi / 2)), torch.tensor([[-4.0, 1.0, -2.0, 5.0]]))


def test_a_rotated_box_is_the_one_around_its_corners():
    boxes, _, _ = predictions(30, dtype=torch.float64)
    angle = 0.3
    matrix = view(1.5, (7, -3), angle=angle).astype(np.float64)
    for box, warped in zip(boxes.tolist(), warp_boxes(boxes, matrix).tolist(), strict=True):
        corners = [(x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
        moved = [matrix @ [x, y, 1] for x, y in corners]
        xs, ys = [m[0] / m[2] for m in moved], [m[1] / m[2] for m in moved]
        assert warped == pytest.approx([min(xs), min(ys), max(xs), max(ys)], rel=1e-12)


def test_perspective():
    matrix = np.array([[1.0, 0.1, 3], [0.05, 1.1, 2], [0.001, 0.002, 1]])
    x, y = warp_boxes(torch.tensor([[10.0, 20.0, 10.0, 20.0]]).double(), matrix)[0, :2].tolist()
    depth = 0.001 * 10 + 0.002 * 20 + 1
    assert (x, y) == pytest.approx(((10 + 2 + 3) / depth, (0.5 + 22 + 2) / depth))


@pytest.mark.parametrize('first', [view(), view(0.7, (3, 4)), view(1.3, flip=200.0)])
@pytest.mark.parametrize('second', [view(2.0), view(0.4, (-20, 9), flip=100.0)])
def test_boxes_round_trip_between_views(first, second):
    original, scores, labels = predictions(50)
    there = between_views(first, second)
    in_first = warp_boxes(original, first)
    in_second = warp_boxes(in_first, there)
    torch.testing.assert_close(in_second, warp_boxes(original, second), rtol=1e-5, atol=1e-4)
    back = warp_boxes(in_second, between_views(second, first))
    torch.testing.assert_close(back, in_first, rtol=1e-5, atol=1e-4)


def test_boxes_that_leave_the_view_are_dropped():
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 0, 12, 10], [30, 0, 40, 10]])
    ones = torch.ones(3)
    pseudo = PseudoBoxes(boxes, ones * 0.8, torch.tensor([2, 1, 0]), ones)
    found = warp_pseudo_boxes(pseudo, view(shift=(-9.5, 0)), (10, 20))
    assert found.boxes.tolist() == [[0, 0, 2.5, 10]] and found.labels.tolist() == [1]
    assert len(warp_pseudo_boxes(pseudo, view(shift=(-9.5, 0)), (10, 25), min_side=0.1)) == 3


def test_a_view_that_shows_nothing():
    with pytest.raises(ValueError, match='homography_matrix is singular'):
        between_views(np.zeros((3, 3)), np.eye(3))


def test_the_box_that_the_released_code_makes_up():
    like = torch.zeros(0)
    sides = []
    for seed in range(50):
        pseudo = artificial_box((40, 100), torch.Generator().manual_seed(seed), like)
        x1, y1, x2, y2 = pseudo.boxes[0].tolist()
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((50, 20), abs=1e-4)
        sides += [(x2 - x1) / 100, (y2 - y1) / 40]
        assert pseudo.labels.tolist() == [0] and pseudo.weights.tolist() == [1]
    assert min(sides) >= 0.2 - 1e-6 and max(sides) <= 0.8 + 1e-6 and min(sides) < 0.25 and max(sides) > 0.75


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(weighting='soft'), "unknown weighting 'soft'"),
        (dict(iou_threshold=2), 'pseudo_labels.iou_threshold'),
        (dict(max_count=0), 'pseudo_labels.max_count'),
        (dict(score_threshold=50), 'pseudo_labels.score_threshold'),
        (dict(score_threshold=[0.5, -0.1]), 'pseudo_labels.score_threshold'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        select_boxes(*predictions(3), **options)
