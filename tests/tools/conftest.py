"""Tools as a user runs them: from a config file, in a process of their own or in this one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from kd_dense.data.scene_drawing import CLASSES
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('tools_data') / 'scenes')


@pytest.fixture(scope='session')
def teacher(tmp_path_factory) -> dict:
    config = tiny.segmentor(8)
    path = tmp_path_factory.mktemp('tools_teacher') / 'teacher.pth'
    return dict(config=config, checkpoint=tiny.saved(config, path, CLASSES))


@pytest.fixture(scope='session')
def config(scenes, teacher, tmp_path_factory) -> Path:
    """A config file: four iterations, a checkpoint and a validation every two."""
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=teacher,
        distillers=dict(
            logits=dict(type='LogitKD', temperature=2.0, loss_weight=1.0),
            mimic=dict(type='FeatureMimic', taps='backbone:3'),
        ),
    )
    cfg = tiny.segmentation_run(model, scenes)
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=4)
    path = tmp_path_factory.mktemp('tools_config') / 'tiny.py'
    cfg.dump(str(path))
    return path


@pytest.fixture
def call(monkeypatch) -> Callable[..., None]:
    """``call('train', *arguments)``: the ``main`` of a tool, with these command-line arguments."""

    def run(name: str, *arguments: object) -> None:
        spec = importlib.util.spec_from_file_location(f'{name}_tool', ROOT / 'tools' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, arguments)])
        monkeypatch.setenv('LOCAL_RANK', '0')
        forget_runs()
        module.main()

    return run


@pytest.fixture
def error(call, capsys) -> Callable[..., str]:
    """Like ``call``, for what can not work: checks exit code 2 and that nothing but one sentence is the error."""

    def run(name: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            call(name, *arguments)
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def run_process(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a Python command line in a folder of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
        command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def forget_runs() -> None:
    """MMEngine keeps what belongs to a run under the second in which it began; a tiny run takes less than one."""
    for kind in (MMLogger, MessageHub, DefaultScope, Visualizer):
        kind._instance_dict.clear()


def scalars(work_dir: Path) -> list[dict]:
    """The training log lines that MMEngine wrote, of all runs in ``work_dir``."""
    lines = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def edited(config: Path, path: Path, **options: object) -> Path:
    """A copy of a config file with entries changed: ``edited(config, path, **{'a.b': 1})``."""
    cfg = Config.fromfile(str(config))
    cfg.merge_from_dict(options)
    cfg.dump(str(path))
    return path
