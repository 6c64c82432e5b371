"""Pseudo label maps against loops, their way into another view and back, and the balance of classes."""

import math

import numpy as np
import pytest
import torch

from kd_dense.adaptation import (
    balanced_class_weights,
    between_views,
    pseudo_label_map,
    sampling_probabilities,
    warp_label_map,
)
from kd_dense.errors import ConfigError
from tests.adaptation.test_pseudo_boxes import view
from tests.helpers.dispatch import Operations


def logits(b=2, c=4, h=5, w=6):
    return 3 * torch.randn(b, c, h, w, dtype=torch.float64)


def by_loops(x, thresholds, ignore=255):
    b_, c_, h, w = x.shape
    labels, confidence = np.zeros((b_, h, w), int), np.zeros((b_, h, w))
    for b, i, j in np.ndindex(b_, h, w):
        powers = [math.exp(v) for v in x[b, :, i, j].tolist()]
        best = int(np.argmax(powers))
        confidence[b, i, j] = powers[best] / sum(powers)
        labels[b, i, j] = best if confidence[b, i, j] > thresholds[best] else ignore
    return labels, confidence


@pytest.mark.parametrize('threshold', [0.8, (0.5, 0.7, 0.9, 1.0)])
def test_labels_and_confidence_equal_loops(threshold):
    x = logits()
    labels, confidence = by_loops(x, [threshold] * 4 if isinstance(threshold, float) else threshold)
    found = pseudo_label_map(x, threshold)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-12)
    np.testing.assert_array_equal(found.weights, labels != 255)
    assert 0 < (labels == 255).sum() < labels.size
    soft = pseudo_label_map(x, threshold, weighting='confidence')
    np.testing.assert_allclose(soft.weights, confidence * (labels != 255), rtol=1e-12)


def test_share_of_the_image():
    x = logits()
    labels, confidence = by_loops(x, [0.8] * 4)
    found = pseudo_label_map(x, 0.8, weighting='share')
    np.testing.assert_array_equal(found.labels, x.argmax(1))
    for b in range(2):
        np.testing.assert_allclose(found.weights[b], (confidence[b] > 0.8).mean(), rtol=1e-12)


@pytest.mark.parametrize('weighting', ['hard', 'confidence', 'share'])
def test_what_does_not_count(weighting):
    x = logits()
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[0, :, 2:], mask[1] = False, False
    found = pseudo_label_map(x, 0.5, ignore_index=99, weighting=weighting, mask=mask)
    assert (found.labels[~mask[:, 0]] == 99).all() and (found.weights[~mask[:, 0]] == 0).all()
    alone = pseudo_label_map(x[:1, :, :2], 0.5, ignore_index=99, weighting=weighting)
    assert torch.equal(found.labels[0, :2], alone.labels[0])
    torch.testing.assert_close(found.weights[0, :2], alone.weights[0])


def test_nothing_is_sure_enough():
    found = pseudo_label_map(torch.zeros(1, 3, 4, 4), 0.9)
    assert (found.labels == 255).all() and found.weights.sum() == 0
    torch.testing.assert_close(found.confidence, torch.full((1, 4, 4), 1 / 3))


def test_half_precision_and_large_logits():
    x = torch.randn(2, 5, 8, 8) * 60
    found, exact = pseudo_label_map(x.bfloat16(), 0.7), pseudo_label_map(x.bfloat16().double(), 0.7)
    assert torch.equal(found.labels, exact.labels) and found.confidence.dtype == torch.float32
    assert found.confidence.isfinite().all() and not pseudo_label_map(x.requires_grad_()).weights.requires_grad


def test_does_not_wait_for_the_device():
    x, threshold = logits(), torch.full((4,), 0.8)
    with Operations() as operations:
        pseudo_label_map(x, threshold, weighting='share')
    assert operations.seen == [] and operations.uploads == []


def test_worked_maps():
    labels = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert torch.equal(warp_label_map(labels, np.eye(3), (3, 4)), labels)
    assert torch.equal(warp_label_map(labels, view(flip=4.0), (3, 4)), labels.flip(2))
    shifted = warp_label_map(labels, view(shift=(1, -1)), (3, 4))
    assert shifted.tolist() == [[[255, 4, 5, 6], [255, 8, 9, 10], [255] * 4]] and shifted.dtype == torch.uint8
    doubled = warp_label_map(labels, view(2.0), (6, 8))
    assert torch.equal(doubled, labels.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (warp_label_map(labels, view(shift=(5, 0)), (3, 4)) == 255).all()
    turned = warp_label_map(labels, view(shift=(3, 0), angle=math.pi / 2), (4, 3))
    assert torch.equal(turned[0], labels[0].rot90(-1))


def test_a_warp_for_each_image_and_of_weights():
    weights = torch.rand(2, 3, 4)
    both = warp_label_map(weights, np.stack([np.eye(3), view(flip=4.0)]), (3, 4), fill=0)
    assert torch.equal(both, torch.stack([weights[0], weights[1].flip(1)])) and both.dtype == weights.dtype
    assert (warp_label_map(weights, view(shift=(0, 3)), (3, 4), fill=0) == 0).all()


def test_equals_loops_under_a_perspective():
    labels = torch.randint(0, 9, (1, 12, 14))
    matrix = np.array([[1.2, 0.3, -2], [-0.1, 0.9, 1], [0.004, -0.003, 1]])
    found = warp_label_map(labels, matrix, (10, 16))[0]
    inverse = np.linalg.inv(matrix)
    for i, j in np.ndindex(10, 16):
        x, y, depth = inverse @ [j + 0.5, i + 0.5, 1]
        row, column = math.floor(y / depth), math.floor(x / depth)
        inside = 0 <= row < 12 and 0 <= column < 14
        assert found[i, j] == (labels[0, row, column] if inside else 255), (i, j)
    assert 20 < (found != 255).sum() < 160


@pytest.mark.parametrize('there', [view(flip=24.0), view(2.0, (5, -3)), view(3.0, flip=60.0), view(1.7, angle=0.4)])
def test_maps_round_trip(there):
    """Regions of four pixels survive a way there and back wherever the other view has seen them."""
    labels = torch.randint(0, 9, (1, 5, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    seen = warp_label_map(labels, there, (60, 80))
    back = warp_label_map(seen, between_views(there, np.eye(3)), labels.shape[1:])
    known = back != 255
    assert known.float().mean() > 0.5
    wrong = (back != labels) & known
    if there[0, 1] == 0:
        assert not wrong.any()
    else:  # a rotation rounds: only at the borders between regions, one pixel wide
        inner = (torch.arange(20) % 4).add(1)[:, None].mul((torch.arange(24) % 4).add(1)).ge(1)
        inner &= ((torch.arange(20) % 4 - 1.5).abs() < 1)[:, None] & ((torch.arange(24) % 4 - 1.5).abs() < 1)
        assert not wrong[0][inner].any() and wrong.float().mean() < 0.1


def test_balanced_class_weights():
    weights = balanced_class_weights(torch.tensor([60, 30, 10, 0]))
    assert weights.tolist() == pytest.approx([100 / 180, 100 / 90, 100 / 30, 0])
    assert (weights * torch.tensor([60, 30, 10, 0])).sum().item() == pytest.approx(100)
    assert balanced_class_weights(torch.tensor([10**6, 1]), limit=7)[1] == 7
    assert balanced_class_weights(torch.zeros(3)).tolist() == [0, 0, 0]


def test_sampling_probabilities():
    counts = [700, 290, 10, 0]
    powers = [math.exp((1 - n / 1000) / 0.5) for n in counts[:3]]
    found = sampling_probabilities(torch.tensor(counts), 0.5)
    assert found.tolist() == pytest.approx([p / sum(powers) for p in powers] + [0])
    assert sampling_probabilities(torch.tensor(counts)).argmax() == 2
    with pytest.raises(ConfigError, match='no class occurs'):
        sampling_probabilities(torch.zeros(3))
    with pytest.raises(ConfigError, match='sampling.temperature'):
        sampling_probabilities(torch.ones(3), 0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(weighting='score'), "unknown weighting 'score'"),
        (dict(threshold=1.5), 'pseudo_labels.score_threshold'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        pseudo_label_map(logits(), **options)
