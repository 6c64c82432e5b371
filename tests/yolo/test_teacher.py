"""Loading a teacher: it is the one that was meant, or the run does not start."""

import copy

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import ClassificationModel
from ultralytics.utils import YAML

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.yolo.teacher import check_class_taps, load_teacher
from tests.yolo.helpers import FAMILIES, build, save_model, small_yaml


class OfTheUser(nn.Module):
    """A class that is neither torch's nor Ultralytics'."""


@pytest.fixture(scope='module')
def student():
    return build('yolo11')


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('task', ['', '-seg'])
def test_weights_are_those_of_the_file(family, task, student, tmp_path):
    model = build(family, 0.1875, task, seed=1)
    loaded = load_teacher({'checkpoint': str(save_model(model, tmp_path / 'a.pt'))}, student)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_half_precision_files_are_loaded_in_float32(student, tmp_path):
    path = save_model(build('yolo11', 0.1875).half(), tmp_path / 'a.pt')
    assert {p.dtype for p in load_teacher({'checkpoint': str(path)}, student).parameters()} == {torch.float32}


def test_files_that_are_no_teacher(student, tmp_path):
    def refuse(path, message):
        with pytest.raises(ConfigError, match=f'teacher.checkpoint: {message}'):
            load_teacher({'checkpoint': str(path)}, student)

    refuse('yolo11m.pt', 'there is no file yolo11m.pt')  # a name that Ultralytics would download
    refuse(tmp_path, 'there is no file')
    refuse(
        save_model(ClassificationModel('yolo11n-cls.yaml', nc=2, verbose=False), tmp_path / 'b.pt'),
        '.*ClassificationModel',
    )
    (tmp_path / 'c.pt').write_bytes(b'no checkpoint')
    refuse(tmp_path / 'c.pt', '.*can not be loaded')
    torch.save({'state_dict': {}}, tmp_path / 'd.pt')
    refuse(tmp_path / 'd.pt', '.*holds no Ultralytics model')
    broken = build('yolo11')
    next(broken.parameters()).data.fill_(float('nan'))
    refuse(save_model(broken, tmp_path / 'e.pt'), '.*not finite')
    refuse(save_model(build('yolo11', channels=1), tmp_path / 'f.pt'), '.*1 channels, the student 3')


def test_other_classes_in_a_file_need_trust(student, tmp_path):
    model = build('yolo11')
    model.extra = OfTheUser()
    path = save_model(model, tmp_path / 'a.pt')
    with pytest.raises(ConfigError, match='trusted=True'):
        load_teacher({'checkpoint': str(path)}, student)
    assert isinstance(load_teacher({'checkpoint': str(path), 'trusted': True}, student).extra, OfTheUser)


def test_the_config_must_be_the_one_of_the_file(student, tmp_path):
    path = save_model(build('yolo11', 0.1875), tmp_path / 'a.pt')
    YAML.save(tmp_path / 'sameyolo11n.yaml', small_yaml('yolo11', 0.1875))
    YAML.save(tmp_path / 'otheryolo11n.yaml', small_yaml('yolo11', 0.25))
    YAML.save(tmp_path / 'yolov8n.yaml', small_yaml('yolov8', 0.1875))
    state = torch.get_rng_state()
    load_teacher({'checkpoint': str(path), 'config': str(tmp_path / 'sameyolo11n.yaml')}, student)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r'a\.pt does not fit the teacher config: .*have another shape'):
        load_teacher({'checkpoint': str(path), 'config': str(tmp_path / 'otheryolo11n.yaml')}, student)
    with pytest.raises(ConfigError, match=r'a\.pt does not fit the teacher config: .*missing'):
        load_teacher({'checkpoint': str(path), 'config': str(tmp_path / 'yolov8n.yaml')}, student)
    with pytest.raises(ConfigError, match='teacher.config: yolo99n.yaml is no model YAML'):
        load_teacher({'checkpoint': str(path), 'config': 'yolo99n.yaml'}, student)


def test_classes_are_compared_by_name(student, tmp_path):
    path = str(save_model(build('yolo11', names=('disc', 'box')), tmp_path / 'a.pt'))
    with pytest.raises(ConfigError, match='the teacher lacks square'):
        load_teacher({'checkpoint': path}, student)
    load_teacher({'checkpoint': path, 'classes': {'square': 'box'}}, student)
    load_teacher({'checkpoint': path, 'classes': 'ignore'}, student)
    swapped = str(save_model(build('yolo11', names=('square', 'disc')), tmp_path / 'b.pt'))
    with pytest.raises(ConfigError, match='another order'):
        load_teacher({'checkpoint': swapped}, student)


def test_ignored_classes_are_for_features_only():
    check_class_taps(
        Distillers({'a': {'type': 'Native'}, 'b': {'type': 'FeatureMimic', 'taps': 'neck'}}), {'classes': 'ignore'}
    )
    logits = Distillers({'a': {'type': 'LogitKD'}})
    check_class_taps(logits, {'classes': None})
    with pytest.raises(ConfigError, match=r'distillers\.a compares class predictions'):
        check_class_taps(logits, {'classes': 'ignore'})


def test_the_memory_format_is_the_students(student, tmp_path):
    path = str(save_model(build('yolo11', 0.1875), tmp_path / 'a.pt'))
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher = load_teacher({'checkpoint': path}, copy.deepcopy(student).to(memory_format=layout))
        assert teacher.model[1].conv.weight.is_contiguous(memory_format=layout)
