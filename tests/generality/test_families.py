"""Every family of detectors with the methods for its head, on batches of all kinds, and across families."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmengine.config import ConfigDict

from kd_dense import ConfigError, Distillation
from tests.generality.catalog import DETECTORS, Model
from tests.generality.families import FAMILIES, Family
from tests.generality.shrink import detection_batch, join, narrow, one_step, read, step

#: Teachers and students of other families are as narrow as can be.
MODELS = {model.name: model for model in DETECTORS}
BY_NAME = {family.name: family for family in FAMILIES}
NECK = dict(type='FeatureMimic', taps='neck', connector='Conv1x1')


def families(*names: str) -> list:
    """For pytest: quick ones always, the others with the slow tests."""
    found = [BY_NAME[name] for name in names] if names else FAMILIES
    return [pytest.param(f, id=f.name, marks=[] if f.quick else [pytest.mark.slow]) for f in found]


def configs(entry: Model, classes: int | None = None) -> tuple[ConfigDict, ConfigDict]:
    """Student and teacher of an entry of the catalog."""
    config = read('mmdet', entry.config, entry.size)
    if classes is not None:
        _set(config, 'num_classes', classes)
    return tuple(narrow(config, factor) for factor in entry.factors)


def methods(family: Family) -> dict[str, dict]:
    """Features on the neck, and what is for the head, together."""
    return {'neck': NECK} | {kind.lower(): dict(type=kind, **options) for kind, options in family.heads.items()}


def learned(found: dict, distillers: dict) -> None:
    """Every term is there and finite, and the student and every connector learn."""
    losses = found['losses']
    assert all(math.isfinite(value) for value in losses.values()), losses
    for name in distillers:
        own = [value for key, value in losses.items() if key.startswith(f'kd.{name}.')]
        assert own and sum(own) > 0, (name, losses)
    gradients = [value for value in found['student'].values() if value is not None]
    assert all(math.isfinite(value) for value in gradients)
    assert sum(value > 0 for value in gradients) > 0.4 * len(found['student'])
    assert found['connectors'] and all(found['connectors'].values())


def _set(node: object, key: str, value: object) -> None:
    """Write ``value`` wherever a config has ``key``."""
    if isinstance(node, dict):
        if key in node:
            node[key] = value
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for inner in node:
            _set(inner, key, value)


def joined(family: Family, **arguments) -> tuple[Distillation, dict]:
    """Both models of a family, and its methods."""
    distillers = methods(family)
    entry = family.model
    return join(*configs(entry, **arguments), distillers, entry.size, entry.init), distillers


def batch_of(family: Family, **arguments) -> dict:
    arguments.setdefault('size', family.model.size)
    return detection_batch(arguments.pop('classes', 80), masks=family.model.masks, **arguments)


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', families())
def test_one_step(family):
    model, distillers = joined(family)
    learned(step(model, batch_of(family)), distillers)


@pytest.mark.parametrize('family', families())
def test_methods_for_other_heads_say_so(family):
    entry = family.model
    student, teacher = configs(entry)
    for kind, sentence in family.refused.items():
        with pytest.raises(ConfigError, match=sentence):
            join(student, teacher, {'head': dict(type=kind)}, entry.size)


def test_the_families_of_the_table_are_there():
    assert set(BY_NAME) == {
        *('RetinaNet', 'FCOS', 'ATSS', 'GFL', 'TOOD', 'RTMDet', 'YOLOX'),
        *('Faster R-CNN', 'Cascade R-CNN', 'Mask R-CNN', 'DINO', 'Deformable DETR'),
    }
    known = {'LogitKD', 'LocalizationKD', 'RoIKD', 'QueryKD'}
    for family in FAMILIES:
        assert set(family.heads) | set(family.refused) == known, family.name
        assert not set(family.heads) & set(family.refused), family.name


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', families())
def test_batches_of_many_kinds(family):
    """One model: images of other sizes, of mixed aspect ratio, and without objects, one after another."""
    size = family.model.size
    large, wide, tall = ((size[0] + a, size[1] + b) for a, b in ((64, 64), (0, 96), (96, 0)))
    model, distillers = joined(family)
    learned(step(model, batch_of(family)), distillers)
    for arguments in (
        dict(size=large),  # multi-scale training
        dict(sizes=(wide, tall)),
        dict(counts=(3, 0)),
    ):
        found = step(model, batch_of(family, **arguments))
        learned(found, distillers)
    found = step(model, batch_of(family, counts=(0, 0)))
    assert all(math.isfinite(value) for value in found['losses'].values()), found['losses']
    assert all(value is None or math.isfinite(value) for value in found['student'].values())


@pytest.mark.parametrize('family', families('RetinaNet', 'GFL', 'Faster R-CNN', 'DINO'))
def test_first_batch_without_objects(family):
    """Nothing can be proved of methods that need objects; the next batch proves it."""
    model, distillers = joined(family)
    found = step(model, batch_of(family, counts=(0, 0)))
    assert all(math.isfinite(value) for value in found['losses'].values()), found['losses']
    learned(step(model, batch_of(family)), distillers)


@pytest.mark.parametrize('family', families('RTMDet', 'YOLOX'))
def test_batches_that_are_resized_inside_the_model(family):
    """``BatchSyncRandomResize`` changes images and boxes on the device; context and teacher see what it left."""
    entry = family.model
    distillers = methods(family)
    student, teacher = configs(entry)
    student.data_preprocessor.batch_augments = [
        dict(type='BatchSyncRandomResize', random_size_range=(192, 192), size_divisor=32, interval=1)
    ]
    model = join(student, teacher, distillers, entry.size, entry.init)
    seen = []
    original = model.context
    model.context = lambda *args: seen.append(original(*args)) or seen[-1]
    batch = batch_of(family)
    before = [copy.deepcopy(sample.gt_instances.bboxes) for sample in batch['data_samples']]
    found = step(model, batch)
    learned(found, distillers)
    assert found['canvas'] == (128, 128)  # it takes effect for the next batch
    found = step(model, batch_of(family))
    learned(found, distillers)
    assert found['canvas'] == (192, 192) and seen[-1].canvas == (192, 192)
    for boxes, old in zip(seen[-1].boxes, before, strict=True):
        torch.testing.assert_close(boxes, old * 1.5)


@pytest.mark.parametrize('classes', [1, 80])
@pytest.mark.parametrize('family', families('RetinaNet', 'GFL', 'YOLOX', 'Mask R-CNN', 'Deformable DETR'))
def test_numbers_of_classes(family, classes):
    model, distillers = joined(family, classes=classes)
    learned(step(model, batch_of(family, classes=classes)), distillers)


# -- across families ---------------------------------------------------------------------------------------------------

SWIN = 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
PVT = 'pvt/retinanet_pvtv2-b0_fpn_1x_coco.py'


@pytest.mark.parametrize(
    ('teacher', 'student', 'taps', 'strides'),
    [
        (MODELS['FasterRCNN'].config, MODELS['RetinaHead'].config, ['neck:0', 'neck:1', 'neck:2', 'neck:3'], 4),
        pytest.param(
            SWIN, MODELS['RetinaHead'].config, ['neck:0', 'neck:1', 'neck:2', 'neck:3'], 4, marks=pytest.mark.slow
        ),
        pytest.param(SWIN, MODELS['MaskRCNN'].config, 'neck', 5, marks=pytest.mark.slow),
        pytest.param(PVT, MODELS['RetinaHead'].config, 'neck', 5, marks=pytest.mark.slow),
        pytest.param(MODELS['RetinaHead'].config, PVT, 'neck', 5, marks=pytest.mark.slow),
        pytest.param(MODELS['DINOHead'].config, MODELS['RTMDetSepBNHead'].config, 'neck', 3, marks=pytest.mark.slow),
    ],
    ids=['Faster-RetinaNet', 'Swin-RetinaNet', 'Swin-ResNet', 'PVTv2-ResNet', 'ResNet-PVTv2', 'DINO-RTMDet'],
)
def test_teachers_of_another_family(teacher, student, taps, strides):
    """Levels go together by stride: of Faster R-CNN's 4 to 64 those from 8 on teach RetinaNet's 8 to 64."""
    both = [narrow(read('mmdet', path), 8) for path in (student, teacher)]
    # The student's taps alone are chosen; of the teacher's neck what fits is taken.
    neck = dict(NECK, taps=dict(student=taps, teacher='neck'))
    model = join(*both, {'neck': neck})
    (row,) = model.distillers.table
    ours, theirs = ([t.stride for t in side] for side in (row.student_tensors, row.teacher_tensors))
    assert len(ours) == strides and ours == theirs
    masks = hasattr(model.student, 'roi_head') and model.student.roi_head.with_mask
    learned(step(model, detection_batch(80, masks=masks)), {'neck': neck})


def test_levels_that_the_teacher_does_not_have():
    """RetinaNet's coarsest level has stride 128, Faster R-CNN's 64."""
    both = [narrow(read('mmdet', MODELS[name].config), 16) for name in ('RetinaHead', 'FasterRCNN')]
    with pytest.raises(ConfigError, match='nothing of the teacher has stride 128'):
        one_step(*both, {'neck': NECK}, detection_batch(80))
