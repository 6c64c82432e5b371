"""Data and teachers of the runs of this folder, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config

from kd_dense.data.scene_drawing import CLASSES
from tests.helpers import tiny
from tests.tools.conftest import forget_runs


@pytest.fixture(autouse=True)
def _runs_are_apart() -> None:
    forget_runs()


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('reliability') / 'scenes')


@pytest.fixture(scope='session')
def segmentation(scenes, tmp_path_factory) -> Callable[..., Config]:
    """Distillers -> an mmseg config of four iterations with a checkpoint every two; ``head`` goes to the student."""
    config = tiny.segmentor(8)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    teacher = dict(config=config, checkpoint=tiny.saved(config, path, CLASSES))

    def build(distillers: dict | None = None, data: Path = scenes, **run: int) -> Config:
        distillers = distillers or dict(m=dict(type='FeatureMimic', taps='backbone:2'))
        student = tiny.segmentor(4)
        model = dict(type='kd_dense.Distillation', student=student, teacher=teacher, distillers=distillers)
        cfg = tiny.segmentation_run(model, data, **run)
        cfg.custom_hooks = []
        return cfg

    return build


@pytest.fixture(scope='session')
def detection(scenes, tmp_path_factory) -> Callable[..., Config]:
    """Distillers -> an mmdet config of one epoch."""
    config = tiny.detector('GFL', 8)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    teacher = dict(config=config, checkpoint=tiny.saved(config, path, CLASSES[1:]))

    def build(distillers: dict | None = None, data: Path = scenes) -> Config:
        distillers = distillers or dict(logits=dict(type='LogitKD'), cwd=dict(type='CWD', taps='neck:0'))
        student = tiny.detector('GFL', 4)
        model = dict(type='kd_dense.Distillation', student=student, teacher=teacher, distillers=distillers)
        cfg = tiny.detection_run(model, data, epochs=1)
        cfg.custom_hooks = []
        return cfg

    return build
