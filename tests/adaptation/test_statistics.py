"""What is reported of pseudo labels, on worked examples and against loops."""

import pytest
import torch

from kd_dense.adaptation import BoxStatistics, MapStatistics
from kd_dense.adaptation.pseudo_boxes import PseudoBoxes
from kd_dense.adaptation.statistics import correct_boxes
from tests.adaptation.test_pseudo_boxes import iou, predictions
from tests.helpers.dispatch import Operations


def pseudo(boxes, scores, labels):
    scores = torch.tensor(scores)
    return PseudoBoxes(torch.tensor(boxes).float().view(-1, 4), scores, torch.tensor(labels).long(), scores)


def test_boxes_of_a_worked_example():
    statistics = BoxStatistics(3)
    first = pseudo([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], [0.9, 0.8, 0.7], [1, 1, 0])
    truth = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.tensor([1, 2])
    statistics.update(first, 30, truth)  # the second box claims an object that the first has, the third a wrong class
    statistics.update(pseudo([[0, 0, 5, 5]], [0.6], [2]), 10)  # an image of which the truth is not known
    statistics.update(pseudo([], [], []), 20, truth)
    found = statistics.report(['car', 'cat', 'cup'])
    assert found.pop('score') == pytest.approx(0.75)
    assert found.pop('precision') == pytest.approx(1 / 3)
    assert found == {
        'per_image': 4 / 3,
        'kept': 4 / 60,
        'count.car': 1,
        'precision.car': 0,
        'count.cat': 2,
        'precision.cat': 0.5,
        'count.cup': 1,
    }
    statistics.reset()
    assert statistics.report() == {}


def test_a_collapsed_teacher_shows():
    statistics = BoxStatistics(2)
    statistics.update(pseudo([], [], []), 0)
    assert statistics.report() == {'per_image': 0, 'count.0': 0, 'count.1': 0}


@pytest.mark.parametrize('threshold', [0.3, 0.5])
def test_correct_boxes_equal_loops(threshold):
    boxes, scores, labels = predictions(60, classes=2)
    order = scores.argsort(descending=True)
    found = PseudoBoxes(boxes[order], scores[order], labels[order], scores[order])
    truth = (boxes + 4 * torch.randn_like(boxes))[:15], labels[:15]
    claimed, expected = set(), []
    for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
        overlaps = [iou(box, t) if label == c else -1 for t, c in zip(truth[0].tolist(), truth[1].tolist())]
        best = max(range(15), key=overlaps.__getitem__)
        right = overlaps[best] >= threshold and best not in claimed
        claimed |= {best} if right else set()
        expected.append(right)
    result = correct_boxes(found, *truth, threshold).tolist()
    assert result == expected and 3 < sum(result) < 60


def test_correct_boxes_of_nothing():
    some, none = pseudo([[0, 0, 1, 1]], [0.9], [0]), pseudo([], [], [])
    objects = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert correct_boxes(some, *objects).tolist() == [False]
    assert correct_boxes(none, some.boxes, some.labels).tolist() == []


def test_pixels_of_a_worked_example():
    statistics = MapStatistics(3)
    labels = torch.tensor([[[0, 1, 255, 1], [1, 255, 0, 0]]])
    truth = torch.tensor([[[0, 2, 2, 1], [255, 0, 1, 0]]])
    statistics.update(labels, truth)
    statistics.update(torch.full((1, 2, 4), 255), truth)
    assert statistics.report(['sky', 'road', 'tree']) == {
        'kept': 6 / 16,
        'precision': 3 / 5,
        'count.sky': 3,
        'precision.sky': 2 / 3,
        'count.road': 3,
        'precision.road': 1 / 2,
        'count.tree': 0,
    }
    assert statistics.counts.tolist() == [3, 3, 0]


def test_pixels_without_truth():
    statistics = MapStatistics(2)
    assert statistics.report() == {} and statistics.counts is None
    statistics.update(torch.zeros(1, 2, 2, dtype=torch.uint8))
    assert statistics.report() == {'kept': 1.0, 'count.0': 4, 'count.1': 0}


def test_does_not_wait_for_the_device():
    boxes, maps = BoxStatistics(2), MapStatistics(3)
    some = pseudo([[0, 0, 10, 10], [0, 0, 10, 9]], [0.9, 0.8], [1, 1])
    labels = torch.randint(0, 3, (2, 4, 4))
    with Operations() as operations:
        boxes.update(some, 9, (some.boxes[:1], some.labels[:1]))
        maps.update(labels, labels)
    assert operations.seen == [] and operations.uploads == []
    assert boxes.report()['precision'] == 0.5 and maps.report()['precision'] == 1
