"""The config of a YOLO run: every mistake is one sentence with the closest name."""

import pytest

import kd_dense.yolo
from kd_dense.errors import ConfigError
from kd_dense.yolo import DistillationTrainer
from kd_dense.yolo.config import from_argument, read
from tests.yolo.helpers import FAST

TEACHER = {'checkpoint': 'teacher.pt'}
NATIVE = {'native': {'type': 'Native'}}


def test_a_config_is_read():
    config = read({
        'student': {'model': 'yolo11n.yaml', 'pretrained': False}, 'teacher': TEACHER, 'distillers': NATIVE,
        'data': 'coco.yaml', 'train': {'epochs': 3}, 'val': {'conf': 0.01}, 'coco_json': 'a.json', '_helper': 1,
        'default_scope': 'mmdet',
    })  # fmt: skip
    assert (config.student, config.pretrained, config.data) == ('yolo11n.yaml', False, 'coco.yaml')
    assert (config.train, config.val, config.coco_json) == ({'epochs': 3}, {'conf': 0.01}, 'a.json')
    assert config.teacher['checkpoint'] == 'teacher.pt'
    assert read({'student': 'yolo11n.yaml'}).teacher is None


@pytest.mark.parametrize(('change', 'message'), [
    ({'distilers': {}}, "distilers: no key of a YOLO config; did you mean 'distillers'"),
    ({'teacher': {'chekpoint': 'a.pt'}}, "teacher: unknown key 'chekpoint'; did you mean 'checkpoint'"),
    ({'teacher': {}}, 'teacher.checkpoint: give the .pt file'),
    ({'teacher': {'checkpoint': None}}, 'teacher.checkpoint: give the .pt file'),
    ({'teacher': {**TEACHER, 'classes': 'any'}}, 'teacher.classes: '),
    ({'teacher': 'a.pt'}, "teacher: must be a dict, not 'a.pt'"),
    ({'train': {'epoch': 3}}, "train.epoch: Ultralytics has no such argument; did you mean 'epochs'"),
    ({'val': {'confidence': 3}}, 'val.confidence: Ultralytics has no such argument'),
    ({'train': {'model': 'x'}}, 'train.model: is decided by student'),
    ({'train': {'dis': 3.0}}, 'train.dis: is decided by distillers'),
    ({'student': {'modle': 'x'}}, 'student: give a model YAML'),
    ({'student': 3}, 'student: give a model YAML'),
])  # fmt: skip
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read({'teacher': TEACHER, 'distillers': NATIVE, **change})


@pytest.mark.parametrize(('distillers', 'message'), [
    ({}, 'distillers: needs at least one entry'),
    ({'a': {'type': 'Nativ'}}, r"distillers\.a: unknown distiller 'Nativ'; did you mean 'Native'"),
    ({'a': {'type': 'LogitKD', 'temprature': 2}}, r"distillers\.a: LogitKD has no option 'temprature'.*'temperature'"),
    ({'a': {'type': 'FeatureMimic', 'taps': 'neck', 'loss': 'msee'}}, r"distillers\.a.*unknown loss 'msee'.*'mse'"),
    ({'a': {'type': 'Native', 'loss_weight': -1}}, r'distillers\.a\.loss_weight'),
    ({'dfl2': {'type': 'Native'}}, r'distillers\.dfl2: choose a name'),
])  # fmt: skip
def test_mistakes_in_distillers_are_named_before_anything_is_created(
    distillers, message, write_config, tmp_path, data, student_yaml
):
    path = write_config()
    path.write_text(
        path.read_text().replace("distillers = {'native': {'type': 'Native'}}", f'distillers = {distillers!r}')
    )
    with pytest.raises(ConfigError, match=message):
        DistillationTrainer(
            overrides={
                **FAST,
                'model': student_yaml(),
                'data': str(data),
                'distill_model': str(path),
                'project': str(tmp_path / 'runs'),
            }
        )
    assert not (tmp_path / 'runs').exists()


def test_unknown_taps_are_named(write_config, tmp_path):
    config = write_config(distillers={'a': {'type': 'FeatureMimic', 'taps': 'model.99'}})
    with pytest.raises(ConfigError, match=r"distillers\.a\.taps \(student\).*'model\.99'; did you mean 'model\.9'"):
        kd_dense.yolo.train(config, tmp_path / 'run')


def test_the_argument_is_a_config_or_a_teacher(tmp_path):
    config = from_argument('teacher.pt', 3.0)
    assert config.teacher['checkpoint'] == 'teacher.pt'
    assert config.distillers == {'native': {'type': 'Native', 'loss_weight': 3.0}}
    with pytest.raises(ConfigError, match='distill_model: give the path'):
        from_argument(None, 6.0)
    with pytest.raises(ConfigError, match=r'there is no config file nowhere\.py'):
        from_argument('nowhere.py', 6.0)
    (tmp_path / 'alone.py').write_text("student = 'yolo11n.yaml'")
    with pytest.raises(ConfigError, match='has no teacher'):
        from_argument(str(tmp_path / 'alone.py'), 6.0)


def test_what_training_needs(tmp_path, data):
    with pytest.raises(ConfigError, match='student: give a model YAML'):
        kd_dense.yolo.train({'data': str(data)}, tmp_path, distill=False)
    with pytest.raises(ConfigError, match='there is no config file'):
        kd_dense.yolo.train(tmp_path / 'none.py')
