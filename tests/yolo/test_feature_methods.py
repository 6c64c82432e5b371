"""The feature methods for detectors on YOLO: boxes of its batches, two branches of scores, images without objects."""

import pytest
import torch

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.yolo import DistillationModel
from tests.helpers.dispatch import Operations
from tests.yolo.helpers import build
from tests.yolo.test_model import batch_of, spread_scores, student_of

METHODS = {
    'box': dict(type='BoxGuidedMimic'),
    'gaussian': dict(type='BoxGuidedMimic', mask='gaussian'),
    'scores': dict(type='BoxGuidedMimic', mask='scores'),
    'pkd': dict(type='PKD'),
    'mgd': dict(type='MGD'),
}


def joined(family, task='', **methods):
    teacher = build(family, 0.1875, task=task, seed=1).eval()
    spread_scores(teacher)
    return DistillationModel(student_of(family, task), teacher, Distillers(methods)).train()


@pytest.mark.parametrize('family', ['yolo11', 'yolo26'])
def test_take_a_step(family):
    model = joined(family, **METHODS)
    parts, items = model.loss(batch_of())
    parts.sum().backward()
    model.distillers.verify_gradients()
    assert all(0 < items[name].item() < float('inf') for name in METHODS)
    neck = [x.grad for x in model.student_model.model[4].parameters()]
    assert neck and all(g.isfinite().all() for g in neck)


def test_boxes_are_in_pixels_of_the_canvas():
    model = joined('yolo11', box=METHODS['box'])
    context = model._context(batch_of(64))
    # centre, width and height relative to the image: 0.5, 0.5, 0.4, 0.3
    torch.testing.assert_close(context.boxes[0][0], torch.tensor([0.3, 0.35, 0.7, 0.65]) * 64)
    assert len(context.boxes[0]) == 2 and len(context.boxes[1]) == 0


def test_a_batch_without_objects_is_finite_and_waited_out():
    model = joined('yolo11', box=METHODS['box'])
    parts, items = model.loss(batch_of(empty=True))
    parts.sum().backward()
    assert items['box'] == 0 and parts.isfinite().all()
    _, items = model.loss(batch_of())
    assert items['box'] > 0


def test_scores_are_matched_to_the_levels_that_are_compared():
    """YOLO26 has two branches on three levels; two of the levels are compared."""
    taps = dict(student=['neck:0', 'neck:2'], teacher=['neck:0', 'neck:2'])
    model = joined('yolo26', scores=METHODS['scores'] | dict(taps=taps))
    assert model.distillers.methods['scores']._branches == [[0, 3], [2, 5]]
    assert model.loss(batch_of())[1]['scores'] > 0
    with pytest.raises(ConfigError, match='tap the levels that feed its head'):
        joined('yolo26', scores=METHODS['scores'] | dict(taps='model.0'))


def test_nothing_waits_in_a_step():
    model = joined('yolo11', **METHODS)
    batch = batch_of()
    model.loss(batch)  # proves the first step, which asks
    context = model._context(batch)
    active = model.distillers.active(0.0)
    student, teacher = (model.distillers.taps(side, active) for side in ('student', 'teacher'))
    with student.record():
        model.student_model(batch['img'])
        values = student.take()
    with torch.no_grad(), teacher.record():
        model.teacher_model(batch['img'])
        theirs = teacher.take()
    with Operations() as operations:
        losses = model.distillers(values, theirs, context, lambda: None)
        sum(losses.values()).backward()
    assert operations.seen == [] and operations.uploads == []
