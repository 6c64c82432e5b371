"""When outputs count as equal."""

import pytest
import torch

from kd_dense.export.report import Comparison, Detections, Report, unmatched_detections


def only(comparison):
    (row,) = comparison.rows()
    return row


def test_difference_is_relative_to_the_largest_value():
    wanted = torch.tensor([[0.0, -50.0, 10.0]])
    comparison = Comparison(1e-3)
    comparison.tensors('1x3', ['a'], [wanted], [wanted + torch.tensor([0.0, 0.0, 0.04])])  # 0.04 / 50 = 8e-4
    row = only(comparison)
    assert row.equal and (row.difference, row.relative, row.shape) == ('4.00e-02', '8.00e-04', '1x3')
    comparison.tensors('1x3', ['a'], [wanted], [wanted + torch.tensor([0.06, 0.0, 0.0])])  # 0.06 / 50 = 1.2e-3
    assert not only(comparison).equal and only(comparison).relative == '1.20e-03'


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('later', [False, True])
def test_what_is_not_a_number_is_different(bad, later):
    comparison = Comparison(1.0)
    pairs = [([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0])]
    for wanted, found in reversed(pairs) if later else pairs:
        comparison.tensors('', ['a'], [torch.tensor(found)], [torch.tensor(wanted)])
    assert not only(comparison).equal
    both = Comparison(1.0)
    both.tensors('', ['a'], [torch.tensor([bad])], [torch.tensor([bad])])
    assert not only(both).equal


def test_label_maps_may_differ_only_where_the_student_is_undecided():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0] = torch.tensor([10.0, 5.0, 5.0, 0.0])
    logits[0, 1] = torch.tensor([0.0, 4.9999, 1.0, 0.0])
    wanted = logits.argmax(1)
    for changed, equal in ((1, True), (2, False)):  # margins 0.0001 and 4; 2 * 1e-4 * 10 = 0.002 is rounding
        found = wanted.clone()
        found[0, 0, changed] = 1
        comparison = Comparison(1e-4)
        comparison.labels('', logits, wanted, found)
        assert only(comparison).equal is equal
        assert only(comparison).difference == '1 of 4 pixels'


def detections(boxes, scores, labels=None, size=(100, 200)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes)) if labels is None else torch.tensor(labels)
    return Detections(boxes, torch.tensor(scores), labels, size)


TWO = [[0, 0, 10, 10], [50, 50, 80, 90]]


def test_detections__order_and_rounding_do_not_matter():
    wanted = detections(TWO, [0.9, 0.8], [1, 2])
    moved = detections([[50.1, 50, 80, 90], [0, 0, 10, 10]], [0.8, 0.9005], [2, 1])
    unmatched, box, score = unmatched_detections(wanted, moved, 1e-3)  # 1e-3 of 200 pixels
    assert unmatched == 0
    assert box == pytest.approx(0.1, abs=1e-5) and score == pytest.approx(0.0005, abs=1e-6)


@pytest.mark.parametrize(
    'found',
    [
        detections([TWO[0], [51, 50, 80, 90]], [0.9, 0.8], [1, 2]),  # a corner
        detections(TWO, [0.95, 0.8], [1, 2]),  # a score
        detections(TWO, [0.9, 0.8], [2, 2]),  # a class
    ],
)
def test_detections__another_corner_score_or_class_is_a_difference(found):
    assert unmatched_detections(detections(TWO, [0.9, 0.8], [1, 2]), found, 1e-3)[0] > 0


def test_detections__one_more_is_a_difference_unless_rounding_decides_about_it():
    three, two = detections([*TWO, [20, 20, 30, 30]], [0.9, 0.8, 0.3]), detections(TWO, [0.9, 0.8])
    assert unmatched_detections(three, two, 1e-3)[0] == unmatched_detections(two, three, 1e-3)[0] == 1
    assert unmatched_detections(three, two, 1e-3, threshold=0.25)[0] == 1
    assert unmatched_detections(three, two, 1e-3, threshold=0.2995)[0] == 0
    other = detections([*TWO, [70, 20, 90, 30]], [0.9, 0.8, 0.3])  # of the same score, in the last place
    assert unmatched_detections(three, other, 1e-3, limit=4)[0] == 2
    assert unmatched_detections(three, other, 1e-3, limit=3)[0] == 0


def test_detections__nothing_found():
    wanted, nothing = detections(TWO, [0.9, 0.8]), detections([], [])
    assert unmatched_detections(wanted, nothing, 1e-3)[0] == unmatched_detections(nothing, wanted, 1e-3)[0] == 2
    assert unmatched_detections(nothing, nothing, 1e-3)[0] == 0


def test_outputs__of_other_shapes_or_that_do_not_run():
    def broken(batch):
        raise RuntimeError('first line\nInvalid dimension')

    for run, said in ((lambda batch: [torch.ones(2)], 'other shapes'), (broken, 'does not run')):
        comparison = Comparison(1.0)
        assert comparison.outputs('1', ['a'], [torch.ones(3)], run, torch.ones(1)) is None
        assert only(comparison).output == said and not only(comparison).equal
    assert 'Invalid dimension' in only(comparison).shape


def test_report__without_rows_is_not_equal():
    assert not Report('a.onnx', 1e-4, 'nothing').equal
