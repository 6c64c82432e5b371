"""Relational distillation and dynamic prior knowledge between models of Ultralytics."""

import pytest
import torch
from ultralytics.cfg import get_cfg

from kd_dense.distillation import Distillers
from kd_dense.yolo import DistillationModel
from tests.yolo.helpers import FAMILIES, build


def joined(family, **options):
    student, teacher = build(family), build('yolo11', 0.1875, seed=1)
    student.args = get_cfg(overrides={'imgsz': 64, 'epochs': 3, 'task': 'detect'})
    return DistillationModel(student, teacher, Distillers({'own': options})).train()


def batch(objects):
    """Two images of 96 x 96, of which the second has one object."""
    corner = torch.rand(objects, 2) * 0.5
    size = 0.1 + torch.rand(objects, 2) * 0.4
    return {
        'img': torch.rand(2, 3, 96, 96),
        'bboxes': torch.cat([corner + size / 2, size], 1),
        'cls': torch.randint(0, 2, (objects, 1)).float(),
        'batch_idx': torch.tensor([0.0] * (objects - 1) + [1.0] * (objects > 0))[:objects],
    }


@pytest.mark.parametrize('family', FAMILIES)
def test_rkd(family):
    model = joined(family, type='RKD')
    for objects, compared in ((0, False), (2, False), (5, True)):
        parts, items = model.loss(batch(objects))
        assert (items['own'] > 0) == compared and items['own'] < 8
    model.zero_grad()
    (parts[-1] / 2).backward()
    assert model.student_model.model[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('family', FAMILIES)
def test_dpk(family):
    model = joined(family, type='DPK', width=16, depth=(1, 1), heads=2)
    parts, items = model.loss(batch(3))
    assert 0 < items['own'] < 10
    parts.sum().backward()
    model.distillers.verify_gradients()
    ratios = model.distillers.state_dict()['methods.own.ratios']
    assert len(ratios) == 3 and ratios[0] != 0.5 and ratios[2] == 0.5  # 288 cells, and 18, which are too few
