"""Localisation distillation between models of Ultralytics."""

import pytest
import torch
from ultralytics.nn.tasks import OBBModel, RTDETRDetectionModel

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.geometry.dense_boxes import anchors_of, corners, grid_anchors
from kd_dense.taps import Taps
from kd_dense.yolo import DistillationModel
from kd_dense.yolo.describe import describe
from tests.yolo.helpers import FAMILIES, build
from tests.yolo.test_describe import count_calls
from tests.yolo.test_model import batch_of, student_of


@pytest.mark.parametrize('family', FAMILIES)
def test_boxes_are_those_that_the_head_decodes(family):
    model = build(family).eval()
    images = torch.rand(2, 3, 64, 96)
    description = describe(model)
    boxes = description.boxes
    assert (boxes.kind, boxes.bins) == (('distance', 1) if family == 'yolo26' else ('distribution', 16))
    assert boxes.strides == (8.0, 16.0, 32.0)
    model.model[-1].end2end = False  # decoded boxes of the one-to-many branch, not the best of the other
    taps = Taps(model, ['boxes'], description.aliases)
    with torch.no_grad(), taps.record():
        decoded, _ = model(images)
    found = []
    for level, values in enumerate(taps.take()['boxes']):
        size, stride = values.shape[2:], boxes.strides[level]
        values = values.flatten(2)[:, None]
        values = values.unflatten(2, (4, 16)) if boxes.kind == 'distribution' else values
        seen = corners(values, boxes, level, anchors_of(boxes, level, 1.0), size)[:, 0] * stride
        found.append(seen + grid_anchors(torch.zeros(1, 4), stride, size)[:, 0].T)
    x1, y1, x2, y2 = torch.cat(found, 2).unbind(1)
    expected = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
    torch.testing.assert_close(decoded[:, :4], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('task', ['', '-seg'])
def test_a_step_reaches_the_box_branch_and_what_is_below(family, task):
    distillers = {'boxes': {'type': 'LocalizationKD'}}
    if family == 'yolo26':
        distillers['deployed'] = {
            'type': 'LocalizationKD', 'taps': 'boxes_one2one', 'score_taps': 'logits_one2one'
        }  # fmt: skip
    student, teacher = student_of(family, task), build(family, 0.1875, task, seed=1).eval()
    model = DistillationModel(student, teacher, Distillers(distillers)).train()
    batch = batch_of()
    if task:
        batch |= {'masks': torch.ones(2, 16, 16), 'sem_masks': torch.zeros(2, 16, 16, dtype=torch.long)}
    parts, items = model.loss(batch)
    assert all(0 < items[name].item() < float('inf') for name in distillers)
    (gradients,) = torch.autograd.grad(parts[-1], student.model[-1].cv2[0][-1].weight)
    assert (gradients != 0).any()
    if family == 'yolo26':
        (gradients,) = torch.autograd.grad(model.loss(batch)[0][-1], student.model[-1].one2one_cv2[0][-1].weight)
        assert (gradients != 0).any()


def test_a_batch_without_objects_adds_nothing():
    model = DistillationModel(
        student_of('yolo11'), build('yolo11', 0.1875, seed=1).eval(), Distillers({'boxes': {'type': 'LocalizationKD'}})
    ).train()
    parts, items = model.loss(batch_of(empty=True))
    parts.sum().backward()
    assert items['boxes'].item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.student_model.parameters())


@pytest.mark.parametrize('family', FAMILIES)
def test_a_teacher_runs_its_box_branches_only(family):
    model = build(family).eval()
    head = f'model.{len(model.model) - 1}.'
    calls, _ = count_calls(model, ['boxes'], torch.rand(2, 3, 64, 64))
    assert {path.split('.')[2] for path in calls if path.startswith(head)} == {'cv2'}


def test_families_with_and_without_distributions_are_compared_by_their_boxes():
    model = DistillationModel(
        student_of('yolo11'), build('yolo26', 0.1875, seed=1).eval(), Distillers({'boxes': {'type': 'LocalizationKD'}})
    ).train()
    assert model.distillers.methods['boxes'].form == 'iou'
    assert model.loss(batch_of())[1]['boxes'].item() > 0


@pytest.mark.parametrize('kind', ['rtdetr', 'obb'])
def test_heads_without_upright_boxes_of_cells_say_so(kind):
    if kind == 'obb':
        model = OBBModel('yolo11n-obb.yaml', nc=2, verbose=False)
    else:
        model = RTDETRDetectionModel('rtdetr-resnet50.yaml', nc=2, verbose=False)
    description = describe(model)
    with pytest.raises(ConfigError, match=r"student has no tap 'boxes': its head .* predicts no upright box per cell"):
        Distillers({'kd': {'type': 'LocalizationKD', 'scores': 'none'}}).setup(description, description)


def test_class_lists_may_differ_where_the_students_scores_are_weights(tmp_path):
    from kd_dense.yolo.teacher import check_class_taps

    ignored = {'checkpoint': 'x.pt', 'classes': 'ignore'}
    check_class_taps(Distillers({'boxes': {'type': 'LocalizationKD'}}), ignored)
    with pytest.raises(ConfigError, match='compares class predictions'):
        check_class_taps(Distillers({'boxes': {'type': 'LocalizationKD', 'scores': 'teacher'}}), ignored)
