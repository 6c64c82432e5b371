"""Configs and teachers that can not work: one sentence, exit code 2, no checkpoint, nothing executed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmseg.models.backbones import ResNetV1c
from torch import nn

from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.run import train
from kd_dense.errors import exit_with_sentence
from kd_dense.registry import LOSSES
from tests.helpers import tiny


class Malicious:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def teacher_of(cfg: Config, **change: object) -> None:
    cfg.model.teacher = dict(cfg.model.teacher, **change)


def missing(cfg: Config, folder: Path) -> None:
    teacher_of(cfg, checkpoint=str(folder / 'nowhere.pth'))


def truncated(cfg: Config, folder: Path) -> None:
    content = Path(cfg.model.teacher.checkpoint).read_bytes()
    (folder / 'half.pth').write_bytes(content[: len(content) // 2])
    teacher_of(cfg, checkpoint=str(folder / 'half.pth'))


def malicious(cfg: Config, folder: Path) -> None:
    torch.save({'state_dict': Malicious(folder / 'executed')}, folder / 'bad.pth')
    teacher_of(cfg, checkpoint=str(folder / 'bad.pth'))


def no_weights(cfg: Config, folder: Path) -> None:
    teacher_of(cfg, checkpoint=None)


def other_architecture(cfg: Config, folder: Path) -> None:
    teacher_of(cfg, config=tiny.detector('RetinaNet', 8))


def other_width(cfg: Config, folder: Path) -> None:
    teacher_of(cfg, config=tiny.segmentor(16))


def no_config(cfg: Config, folder: Path) -> None:
    teacher_of(cfg, config=str(folder / 'nowhere.py'))


def other_classes(cfg: Config, folder: Path) -> None:
    config = tiny.segmentor(8)
    teacher_of(cfg, checkpoint=tiny.saved(config, folder / 'other.pth', ('road', *CLASSES[1:])))


def other_number_of_classes(cfg: Config, folder: Path) -> None:
    config = tiny.segmentor(8, classes=5)
    teacher_of(cfg, config=config, checkpoint=tiny.saved(config, folder / 'five.pth', CLASSES[:5]), classes='ignore')
    cfg.model.distillers = dict(m=dict(type='LogitKD'))


def distiller(**arguments: object) -> Callable[[Config, Path], None]:
    def change(cfg: Config, folder: Path) -> None:
        cfg.model.distillers = dict(m=dict(arguments))

    return change


def in_model(**arguments: object) -> Callable[[Config, Path], None]:
    return lambda cfg, folder: cfg.model.update(arguments)


MIMIC = dict(type='FeatureMimic', taps='backbone:2')
CASES = {
    'teacher checkpoint missing': (missing, 'teacher.checkpoint: ', 'nowhere.pth'),
    'teacher checkpoint not given': (no_weights, 'teacher.checkpoint: none is given', 'teaches nothing'),
    'teacher checkpoint truncated': (truncated, 'teacher.checkpoint: ', 'half.pth is truncated; copy or write'),
    'teacher checkpoint runs code': (malicious, 'teacher.checkpoint: ', 'is not plain data and could run code'),
    'teacher of another architecture': (other_architecture, 'teacher.checkpoint: ', 'does not fit the teacher config'),
    'teacher of another width': (other_width, 'teacher.checkpoint: ', 'have another shape'),
    'teacher config missing': (no_config, 'teacher.config: there is no config file ', 'nowhere.py'),
    'classes that differ': (other_classes, "teacher: its classes differ from the student's: ", 'teacher=dict(classes='),
    'unknown tap': (
        distiller(type='CWD', taps='backbone.layer9'),
        'distillers.m.taps (student): ',
        "did you mean 'backbone.layer",
    ),
    'tap that never runs': (
        distiller(type='CWD', taps='backbone.spare'),
        'distillers: taps (student): ',
        "the module 'backbone.spare' did not run",
    ),
    'tap that runs several times on one side': (
        distiller(type='FeatureMimic', taps=dict(student='backbone.layer1.0.relu', teacher='backbone:0')),
        'distillers.m: taps: the student gives 2 tensors ',
        'choose levels of equal stride',
    ),
    'unknown connector': (distiller(**MIMIC, connector='Conv2x2'), 'distillers.m: connector: ', "'Conv1x1'"),
    'numbers of classes that differ': (other_number_of_classes, 'distillers.m', 'classes'),
    'unknown distiller': (distiller(type='LogitsKD'), 'distillers.m: ', "did you mean 'LogitKD'"),
    'typo in an option': (distiller(type='LogitKD', temprature=2), 'distillers.m: ', "did you mean 'temperature'"),
    'typo in the model': (in_model(distilers={}), 'model: ', "did you mean 'distillers'"),
    'negative weight': (distiller(**MIMIC, loss_weight=-1.0), 'distillers.m.loss_weight: ', '>= 0'),
    'weight that is no number': (distiller(**MIMIC, loss_weight=float('nan')), 'distillers.m.loss_weight: ', 'finite'),
    'connector without gradient': (distiller(**MIMIC, loss='dead'), 'distillers.m: ', 'no gradient reached connectors'),
    'loss not finite in the first step': (distiller(**MIMIC, loss='nan'), 'distillers.m: ', 'is nan in its first step'),
}


@pytest.mark.parametrize('name', CASES)
def test_one_sentence(segmentation, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(
        LOSSES.module_dict, 'dead', lambda s, t, mask=None: (s.detach() - t).square().mean() + 0 * s.sum()
    )
    monkeypatch.setitem(LOSSES.module_dict, 'nan', lambda s, t, mask=None: (s - t).square().mean() * float('nan'))
    change, begin, part = CASES[name]
    cfg = segmentation()
    change(cfg, tmp_path)
    if 'never runs' in name:
        monkeypatch.setattr(ResNetV1c, '__init__', _with_spare(ResNetV1c.__init__))
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        exit_with_sentence(train)(cfg, str(tmp_path / 'run'))
    assert end.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    print(f'{name} | {said}')
    assert len(said) == 1 and said[0].startswith(f'error: {begin}') and part in said[0]
    assert not list((tmp_path / 'run').rglob('*.pth')) and not (tmp_path / 'executed').exists()
    assert time.monotonic() - began < 60


def _with_spare(init: Callable) -> Callable:
    def __init__(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        self.spare = nn.Identity()

    return __init__
