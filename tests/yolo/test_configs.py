"""The shipped configs: they are read, and what is missing is said in a sentence."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

import kd_dense.yolo
from kd_dense.errors import ConfigError
from kd_dense.yolo.config import YoloConfig, read
from kd_dense.yolo.model import DistillationModel
from kd_dense.yolo.run import _task

FOLDER = Path(__file__).parents[2] / 'configs' / 'yolo'
CONFIGS = sorted(p for p in FOLDER.glob('*/*.py') if not p.parent.name.startswith('_'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config(path, tmp_path):
    config = read(path)
    assert config.data.endswith('.yaml')
    assert _task(config.student) in ('detect', 'segment')
    if config.teacher is not None:
        assert config.build_distillers().methods
    text = path.read_text()
    assert text.startswith('# ')
    assert f'python tools/train.py {path.relative_to(FOLDER.parents[1])}' in text
    missing = Config.fromfile(path)
    missing.data = str(tmp_path / 'absent.yaml')
    with pytest.raises(ConfigError, match='data: '):
        kd_dense.yolo.train(missing, tmp_path / 'run')


def untrained(path: Path, config: YoloConfig) -> tuple[nn.Module, nn.Module] | None:
    """Student and teacher of a config; ``None`` where the teacher is no YOLO model."""
    source = config.teacher.get('config')
    if source is None:  # the checkpoint is of one of our own configs
        source = read(FOLDER / 'teachers' / f'{Path(config.teacher["checkpoint"]).parts[1]}.py').student
    if not source.endswith('.yaml'):
        return None
    root = FOLDER.parents[1]
    sources = (str(root / s) if (root / s).is_file() else s for s in (config.student, source))
    student, teacher = (YOLO(s, task=_task(config.student), verbose=False).model for s in sources)
    return student, teacher


@pytest.mark.parametrize('path', [p for p in CONFIGS if read(p).teacher is not None], ids=lambda p: p.stem)
def test_taps_fit_the_models(path):
    """What only the models can tell: that the taps exist, and that the method can bring their shapes together."""
    config = read(path)
    models = untrained(path, config)
    if models is None:
        pytest.skip('its teacher is a model of MMDetection')
    models[0].args = get_cfg(overrides=dict(imgsz=96, epochs=3, task=_task(config.student)))
    model = DistillationModel(*models, config.build_distillers()).train()
    torch.manual_seed(0)
    batch = {
        'img': torch.rand(2, 3, 96, 96),
        'bboxes': torch.tensor(
            [[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.2], [0.5, 0.6, 0.3, 0.6]]
        ),
        'cls': torch.zeros(4, 1),
        'batch_idx': torch.tensor([0.0, 0.0, 0.0, 1.0]),
        'masks': torch.zeros(2, 24, 24),  # of segmentation models
        'sem_masks': torch.zeros(2, 24, 24),
    }
    _, items = model.loss(batch)
    for name in config.distillers:
        assert items[name] >= 0  # 0 while its weight warms up; NaN is not


def test_every_method_that_yolo_supports_has_one():
    types = {d['type'] for path in CONFIGS for d in read(path).distillers.values()}
    assert {'Native', 'CWD', 'FeatureMimic', 'LogitKD', 'LocalizationKD'} <= types


def test_a_missing_teacher_is_said_in_a_sentence(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever has been trained in the checkout
    config = Config.fromfile(FOLDER / 'native' / 'native_yolo11-s_yolo11-n_100e_bccd.py')
    config.data = str(data)
    config.train.update(imgsz=64, batch=4, workers=0, device='cpu', plots=False)
    with pytest.raises(ConfigError, match='teacher.checkpoint: there is no file work_dirs/yolo11-s_'):
        kd_dense.yolo.train(config, tmp_path / 'run')
