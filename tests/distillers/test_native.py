"""Native against NumPy in float64; tests/yolo compares it with Ultralytics' own implementation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from kd_dense.description import Logits, Probe
from kd_dense.distillers import Native
from kd_dense.errors import ConfigError
from tests.helpers.toys import convolved, nothing_masked, probe, resized

STUDENT = [(2, 3, 8, 12), (2, 4, 4, 6)]
TEACHER = [(2, 5, 8, 12), (2, 4, 4, 6)]


def tensors(*shapes):
    return [torch.randn(*s, dtype=torch.float64) for s in shapes]


def made(student, teacher, scores, logits=None):
    method = Native()
    probes = [
        Probe(
            {'features': [x.shape for x in student], 'scores': []}, {'features': ('neck',), 'scores': ()}, (16, 24), ''
        ),
        Probe(
            {'features': [x.shape for x in teacher], 'scores': [x.shape for x in scores]},
            {'features': ('neck',), 'scores': ('branch_logits',)},
            (16, 24),
            logits or Logits(4, 'sigmoid'),
        ),
    ]
    method.setup(*probes)
    return method.double()


def reference(method, student, teacher, branches):
    total = 0.0
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        first, _, last = method.connectors[i]
        hidden = np.maximum(convolved(s, first), 0)
        projected = convolved(torch.tensor(hidden), last)
        logits = sum(b[i].numpy() for b in branches) / len(branches)
        score = resized(expit(logits).max(1, keepdims=True), s.shape[2:])
        error = (projected - resized(t.numpy(), s.shape[2:])) ** 2
        total += (error * score).sum() / (score.sum() * projected.shape[1])
    return total


@pytest.mark.parametrize('branches', [1, 2])
@pytest.mark.parametrize('anchors', [1, 3])
def test_value_equals_numpy(branches, anchors):
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    scores = [tensors((2, 4 * anchors, 8, 12), (2, 4 * anchors, 4, 6)) for _ in range(branches)]
    flat = [x for branch in scores for x in branch]
    method = made(student, teacher, flat)
    losses = method({'features': student, 'scores': []}, {'features': teacher, 'scores': flat}, nothing_masked())
    assert losses['loss'].item() == pytest.approx(reference(method, student, teacher, scores), rel=1e-6)


def test_teacher_of_another_resolution():
    student, teacher = tensors((2, 3, 8, 12)), tensors((2, 5, 4, 6))
    scores = tensors((2, 4, 4, 6))
    method = made(student, teacher, scores)
    losses = method({'features': student, 'scores': []}, {'features': teacher, 'scores': scores}, nothing_masked())
    assert losses['loss'].item() == pytest.approx(reference(method, student, teacher, [scores]), rel=1e-5)


def test_two_convolutions_even_where_the_widths_agree():
    method = made(tensors(*STUDENT), tensors(*TEACHER), tensors((2, 4, 8, 12), (2, 4, 4, 6)))
    sizes = [sum(p.numel() for p in c.parameters()) for c in method.connectors]
    assert sizes == [3 * 5 + 5 + 5 * 5 + 5, 2 * (4 * 4 + 4)]
    assert method.default_loss_weight == 6.0


@pytest.mark.parametrize(
    'scores, logits, message',
    [
        ([(2, 4, 8, 12)] * 2, 'a two-stage detector has none', "teacher's class scores: a two-stage detector has none"),
        ([(2, 4, 8, 12)] * 2, Logits(4, 'softmax'), 'a dense sigmoid head'),
        ([(2, 4, 8, 12)] * 2, Logits(4, 'sigmoid', 'query'), 'a dense sigmoid head'),
        ([(2, 4, 8, 12)] * 3, Logits(4, 'sigmoid'), 'class logits .* are not those of all of its features'),
    ],
)
def test_teachers_that_do_not_fit(scores, logits, message):
    with pytest.raises(ConfigError, match=message):
        made(tensors(*STUDENT), tensors(*TEACHER), tensors(*scores), logits)


def test_scores_are_those_of_the_levels_that_are_compared():
    """A teacher with a finer level than the student: its logits there belong to no pair."""
    features = [(2, 5, 8, 12), (2, 5, 4, 6)]
    scores = [(2, 4, 16, 24), (2, 4, 8, 12), (2, 4, 4, 6)]
    student, teacher = probe('features', *features), probe('features', *features)
    teacher.shapes['scores'] = [torch.Size(s) for s in scores]
    teacher.names['scores'] = ('branch_logits',)
    teacher = replace(teacher, logits=Logits(4, 'sigmoid'))
    method = Native('neck')
    method.setup(student, teacher)
    s, t, z = ([torch.randn(shape) for shape in shapes] for shapes in (features, features, scores))
    loss = method({'features': s}, {'features': t, 'scores': z}, nothing_masked())['loss']
    expected = 0
    for connector, ours, theirs, logits in zip(method.connectors, s, t, z[1:], strict=True):
        weight = logits.sigmoid().amax(1, keepdim=True)
        expected += ((connector(ours) - theirs).square() * weight).sum() / (5 * weight.sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
