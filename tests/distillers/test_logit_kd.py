"""LogitKD on maps, anchors and queries, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax

from kd_dense.context import Context
from kd_dense.description import Logits
from kd_dense.distillers import LogitKD
from kd_dense.errors import ConfigError
from tests.helpers.toys import nothing_masked, probe, ready, resized

ROLE = 'logits'


def tensors(*shapes):
    return [2 * torch.randn(*s, dtype=torch.float64) for s in shapes]


def call(method, student, teacher, context=None):
    losses = method({ROLE: student}, {ROLE: teacher}, context or nothing_masked())
    assert list(losses) == ['loss']
    return losses['loss'].item()


def softmax_kl(s, t, temperature):
    """``s``, ``t``: ``[n, C]``."""
    p, q = softmax(t / temperature, axis=1), softmax(s / temperature, axis=1)
    return temperature**2 * rel_entr(p, q).sum(1).mean()


def sigmoid_kl(s, t, temperature):
    p, q = expit(t / temperature), expit(s / temperature)
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return temperature**2 * kl.sum() / max(1, expit(t).max(1).sum())


REFERENCE = {'softmax': softmax_kl, 'sigmoid': sigmoid_kl}


def rows(x, classes):
    """``[B, A*C, h, w]`` -> ``[n, C]``, anchor by anchor as the dense heads of MMDetection unpack them."""
    x = np.asarray(x)
    return x.transpose(0, 2, 3, 1).reshape(-1, classes)


@pytest.mark.parametrize('anchors', [1, 3])
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_maps_with_anchors(activation, anchors):
    shapes = [(2, anchors * 4, 8, 12), (2, anchors * 4, 4, 6)]
    student, teacher = tensors(*shapes), tensors(*shapes)
    method = ready(LogitKD(temperature=2.0), ROLE, student, teacher, Logits(4, activation))
    # one sum over the positions of both levels, not a mean of two
    s, t = (np.concatenate([rows(x, 4) for x in side]) for side in (student, teacher))
    expected = REFERENCE[activation](s, t, 2.0)
    assert call(method, student, teacher) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_teacher_of_another_resolution(activation):
    student, teacher = tensors((2, 4, 8, 12)), tensors((2, 4, 4, 6))
    method = ready(LogitKD(), ROLE, student, teacher, Logits(4, activation))
    expected = REFERENCE[activation](rows(student[0], 4), rows(resized(teacher[0].numpy(), (8, 12)), 4), 1.0)
    assert call(method, student, teacher) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('anchors', [1, 3])
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_masked_positions_do_not_count(activation, anchors):
    student, teacher = tensors((2, anchors * 4, 4, 6)), tensors((2, anchors * 4, 4, 6))
    method = ready(LogitKD(), ROLE, student, teacher, Logits(4, activation))
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    labels[1, :8] = 255
    context = Context(canvas=(16, 24), image_sizes=torch.tensor([[16, 12], [16, 24]]), label_map=labels)
    parts = [
        np.concatenate([rows(x[:1, :, :, :3], 4), rows(x[1:, :, 2:], 4)])
        for x in (student[0].numpy(), teacher[0].numpy())
    ]
    assert call(method, student, teacher, context) == pytest.approx(REFERENCE[activation](*parts, 1.0), rel=1e-10)
    method.use_mask = False
    everything = REFERENCE[activation](rows(student[0], 4), rows(teacher[0], 4), 1.0)
    assert call(method, student, teacher, context) == pytest.approx(everything, rel=1e-10)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_queries(activation):
    student, teacher = tensors((6, 2, 7, 4)), tensors((3, 2, 7, 4))
    method = ready(LogitKD(temperature=3.0), ROLE, student, teacher, Logits(4, activation, layout='query'))
    # the last of six decoder layers against the last of three
    s, t = student[0][-1].reshape(-1, 4).numpy(), teacher[0][-1].reshape(-1, 4).numpy()
    expected = REFERENCE[activation](s, t, 3.0)
    assert call(method, student, teacher) == pytest.approx(expected, rel=1e-10)
    # padding of the image does not concern queries
    context = Context(canvas=(16, 24), image_sizes=torch.tensor([[1, 1], [1, 1]]))
    assert call(method, student, teacher, context) == pytest.approx(expected, rel=1e-10)
    # denoising queries of the student's training forward come first and are left out
    noisy = torch.cat([torch.randn(6, 2, 5, 4, dtype=torch.float64), student[0]], 2)
    assert call(method, [noisy], teacher) == pytest.approx(expected, rel=1e-10)
    # one layer only
    assert call(method, [student[0][-1]], [teacher[0][-1]]) == pytest.approx(expected, rel=1e-10)


def test_worked_number():
    # one pixel, teacher (3/4, 1/4), student (1/2, 1/2), T = 1
    teacher = torch.tensor([math.log(3), 0.0]).reshape(1, 2, 1, 1).double()
    student = torch.zeros(1, 2, 1, 1).double()
    method = ready(LogitKD(), ROLE, [student], [teacher], Logits(2, 'softmax'))
    assert call(method, [student], [teacher]) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_has_nothing_to_train_and_the_student_gets_the_gradient():
    student, teacher = tensors((2, 4, 4, 6)), tensors((2, 4, 4, 6))
    method = ready(LogitKD(), ROLE, student, teacher, Logits(4, 'sigmoid'))
    assert list(method.parameters()) == []
    student[0].requires_grad_()
    method({ROLE: student}, {ROLE: teacher}, nothing_masked())['loss'].backward()
    assert (student[0].grad != 0).all()


@pytest.mark.parametrize(
    'student, teacher, shapes, message',
    [
        (
            'a two-stage detector has none',
            Logits(4, 'softmax'),
            None,
            'class predictions of the student: a two-stage detector',
        ),
        (Logits(4, 'softmax'), 'YOLOV3Head packs them', None, 'class predictions of the teacher: YOLOV3Head'),
        (
            Logits(4, 'softmax'),
            Logits(5, 'softmax'),
            None,
            r'student has 4 classes \(softmax, map\), the teacher 5 classes',
        ),
        (
            Logits(4, 'softmax'),
            Logits(4, 'sigmoid'),
            None,
            r'4 classes \(softmax, map\), the teacher 4 classes \(sigmoid',
        ),
        (Logits(4, 'softmax'), Logits(4, 'softmax', 'query'), None, r'\(softmax, query\)'),
        (
            Logits(4, 'softmax'),
            Logits(4, 'softmax'),
            [(1, 4, 8, 12), (1, 8, 8, 12)],
            r'of 4 \(student\) and 8 \(teacher\) channels',
        ),
        (Logits(3, 'softmax'), Logits(3, 'softmax'), [(1, 4, 8, 12), (1, 4, 8, 12)], 'do not fit 3 classes per anchor'),
        (
            Logits(4, 'sigmoid', 'query'),
            Logits(4, 'sigmoid', 'query'),
            [(6, 1, 100, 4), (6, 1, 300, 4)],
            r'queries by index: 100 \(student\) and 300 \(teacher\)',
        ),
    ],
)
def test_predictions_that_can_not_be_compared(student, teacher, shapes, message):
    shapes = shapes or [(1, 4, 8, 12)] * 2
    with pytest.raises(ConfigError, match=message):
        LogitKD().setup(probe(ROLE, shapes[0], logits=student), probe(ROLE, shapes[1], logits=teacher))


def test_different_numbers_of_levels():
    logits = Logits(4, 'sigmoid')
    with pytest.raises(ConfigError, match=r'student gives 1 tensors .*stride 2.* teacher 2'):
        LogitKD().setup(probe(ROLE, (1, 4, 8, 12), logits=logits), probe(ROLE, *[(1, 4, 8, 12)] * 2, logits=logits))
