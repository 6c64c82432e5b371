"""A detector of MMDetection as the teacher of a YOLO student: what it sees, what is taken from it, what is refused."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from kd_dense import ConfigError
from kd_dense.analysis.doctor import examine
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.distillation import Distillers
from kd_dense.models.build import build_model
from kd_dense.yolo import DistillationModel, train
from kd_dense.yolo.doctor import YoloToolbox
from kd_dense.yolo.examples import examples
from kd_dense.yolo.teacher import check_class_taps, load_teacher
from tests.generality.shrink import narrow, read
from tests.helpers import tiny
from tests.yolo.helpers import CLASSES, build
from tests.yolo.test_model import batch_of, student_of

MIMIC = {'mimic': {'type': 'FeatureMimic', 'taps': 'neck'}}


@pytest.fixture(scope='module')
def detector() -> dict:
    return tiny.detector('FasterRCNN', width=4)


@pytest.fixture(scope='module')
def files(detector, tmp_path_factory) -> dict:
    """``teacher`` of a config: a config file of MMDetection and the weights for it."""
    folder = tmp_path_factory.mktemp('mmdet')
    (folder / 'teacher.py').write_text(f'default_scope = "mmdet"\nmodel = {detector!r}')
    checkpoint = tiny.saved(detector, folder / 'teacher.pth', CLASSES)
    return {'config': str(folder / 'teacher.py'), 'checkpoint': checkpoint}


@pytest.fixture(scope='module')
def student():
    return student_of('yolo11')


def join(teacher, distillers=MIMIC, **student):
    return DistillationModel(student_of('yolo11', **student), teacher, Distillers(distillers)).train()


def levels(model, role='features') -> list[tuple[int, float]]:
    """Width and stride of what is taken from the teacher."""
    (row,) = (row for row in model.distillers.table if row.role == role)
    return [(tensor.shape[0], tensor.stride) for tensor in row.teacher_tensors]


# -- loading -----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_file(files, detector, student):
    state = torch.get_rng_state()
    loaded = load_teacher(files, student)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded).__name__ == 'FasterRCNN'
    expected = torch.load(files['checkpoint'], weights_only=False)['state_dict']
    assert set(expected) == set(loaded.state_dict())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    as_dict = load_teacher({**files, 'config': detector}, student)
    assert torch.equal(as_dict.backbone.conv1.weight, loaded.backbone.conv1.weight)


def test_files_that_are_no_teacher(files, student, tmp_path):
    def refuse(sentence, **options):
        with pytest.raises(ConfigError, match=sentence):
            load_teacher({**files, **options}, student)

    refuse('teacher.checkpoint: .*nowhere.pth', checkpoint='nowhere.pth')
    refuse('teacher.config: there is no config file nowhere.py', config='nowhere.py')
    refuse('does not fit the teacher config', config=tiny.detector('RetinaNet'))
    broken = torch.load(files['checkpoint'], weights_only=False)
    broken['state_dict']['backbone.conv1.weight'].fill_(float('nan'))
    torch.save(broken, tmp_path / 'nan.pth')
    refuse('nan.pth has weights that are not finite', checkpoint=str(tmp_path / 'nan.pth'))
    with pytest.raises(ConfigError, match='its model takes images of 3 channels, the student 1'):
        load_teacher(files, student_of('yolo11', channels=1))


def test_classes_are_compared_by_name_where_the_file_has_them(files, detector, tmp_path):
    load_teacher(files, build('yolo11'))
    other = build('yolo11', names=('disc', 'box'))
    with pytest.raises(ConfigError, match='the teacher lacks box'):
        load_teacher(files, other)
    load_teacher({**files, 'classes': 'ignore'}, other)
    load_teacher({**files, 'classes': {'box': 'square'}}, other)
    nameless = tiny.saved(detector, tmp_path / 'nameless.pth')
    load_teacher({**files, 'checkpoint': nameless}, other)


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'preprocessor',
    [
        {},
        {'mean': [103.53, 116.28, 123.675], 'std': [1.0, 1.0, 1.0], 'bgr_to_rgb': False},  # Caffe's
        {'mean': None, 'std': None, 'bgr_to_rgb': False},  # YOLOX
    ],
)
def test_it_sees_the_images_as_in_its_own_toolbox(detector, preprocessor):
    """Bit patterns of an image, through MMDetection's preprocessor and through ours."""
    config = copy.deepcopy(detector)
    config['data_preprocessor'].update(preprocessor)
    torch.manual_seed(0)
    teacher = build_model(config, 'teacher').eval()
    joined = join(teacher)
    rgb = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = batch_of() | {'img': rgb / 255}
    seen = []
    joined.distillers.methods['mimic'].register_forward_hook(lambda module, args, output: seen.append(args[1]))
    joined.loss(batch)
    data = {'inputs': list(rgb.flip(1)), 'data_samples': tiny.detection_batch(((64, 64),) * 2)['data_samples']}
    with torch.no_grad():
        expected = teacher.extract_feat(teacher.data_preprocessor(data)['inputs'])
    (found,) = (values['features'] for values in seen)
    for ours, theirs in zip(found, expected[1:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_levels_go_together_by_stride(detector):
    """Faster R-CNN has the strides 4 to 64, the student's neck 8 to 32."""
    joined = join(build_model(detector, 'teacher'))
    assert levels(joined) == [(16, 8.0), (16, 16.0), (16, 32.0)]
    assert len(joined.distillers.methods['mimic'].connectors) == 3


def test_levels_that_it_does_not_have():
    with pytest.raises(ConfigError, match='nothing of the teacher has stride 8'):
        join(build_model(tiny.deformable_detr(), 'teacher'))


def test_dino():
    teacher = build_model(narrow(read('mmdet', 'dino/dino-4scale_r50_8xb2-12e_coco.py'), 8), 'teacher')
    joined = join(teacher)
    assert [stride for _, stride in levels(joined)] == [8.0, 16.0, 32.0]
    parts, items = joined.loss(batch_of())
    parts.sum().backward()
    joined.distillers.verify_gradients()
    assert float(items['mimic']) > 0


def test_only_student_and_connectors_learn_and_no_head_runs(detector):
    teacher = build_model(detector, 'teacher')
    joined = join(teacher)
    for name in ('rpn_head', 'roi_head'):
        getattr(teacher, name).forward = lambda *_: pytest.fail('a head ran')
    parts, items = joined.loss(batch_of())
    parts.sum().backward()
    joined.distillers.verify_gradients()
    assert float(items['mimic']) > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(float(p.grad.abs().sum()) > 0 for p in joined.distillers.parameters())
    assert not any('teacher' in name or 'rpn' in name for name in joined.state_dict())


def test_mixed_precision_and_type(detector):
    joined = join(build_model(detector, 'teacher'))
    expected = joined.loss(batch_of())[1]['mimic']
    with torch.autocast('cpu', torch.bfloat16):
        parts, items = joined.loss(batch_of())
    assert items['mimic'].dtype == torch.float32
    assert items['mimic'].item() == pytest.approx(expected.item(), rel=0.05)
    joined.double()
    assert next(joined.teacher_model.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ('distiller', 'tap'),
    [
        ({'type': 'LogitKD'}, 'logits'),
        ({'type': 'Native'}, 'branch_logits'),
        ({'type': 'FeatureMimic', 'taps': {'student': 'neck:0', 'teacher': 'rpn_head:0'}}, 'rpn_head:0'),
    ],
)
def test_heads_are_refused(files, detector, distiller, tap):
    sentence = f"distillers.kd: taps '{tap}' of the teacher, but a teacher of MMDetection gives a YOLO student its feat"
    with pytest.raises(ConfigError, match=sentence):
        check_class_taps(Distillers({'kd': distiller}), files)
    check_class_taps(Distillers(MIMIC), files)
    with pytest.raises(ConfigError):  # built in Python, without a config
        join(build_model(detector, 'teacher'), {'kd': distiller})


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(write_config, files):
    return write_config(teacher={**files}, distillers=MIMIC)


def test_training(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, 'propagate', True)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'teacher_score.json').write_text(json.dumps({'key': 'of another', 'score': {}}))
    with caplog.at_level(logging.INFO):
        record = train(config, tmp_path / 'run')
    assert 'which Ultralytics can not validate, so it is not scored' in caplog.text
    assert 'teacher sees x * [' in caplog.text and '(2 classes)' in caplog.text
    assert not (tmp_path / 'run' / 'teacher_score.json').exists()
    assert record.extra_parameters > 0
    plain = YOLO(str(tmp_path / 'run' / 'weights' / 'last.pt')).model
    assert sum(p.numel() for p in plain.parameters()) == record.parameters


def test_doctor(config):
    report = examine(YoloToolbox(config), iterations=1, images=2, quiet=quiet())
    assert report.failures == [] and report.exit_code == 0
    assert report['scores'].status == 'warning' and 'can not validate' in report['scores'].warnings[0]
    assert report['classes'].facts['teacher'] == list(CLASSES) and report['classes'].facts['result'] == 'the same'
    facts = report['preprocessing'].facts
    assert not facts['identity'] and not facts['channels_reversed']
    assert facts['gain'] == pytest.approx([255 / std for std in tiny.STD], rel=1e-5)
    assert report['gradients'].usable and report['cost'].usable
    assert json.loads(report.to_json())['exit_code'] == 0


def test_examples_leave_it_out(config):
    rows = examples(config, {'teacher': None}, 1)
    assert [set(row) for row in rows] == [{'input', 'truth'}]
