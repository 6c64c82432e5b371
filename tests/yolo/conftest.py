"""A tiny data set and tiny teachers, made once per session; nothing is read from outside the test's own folder."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Read when Ultralytics is imported: its settings go to a folder of their own, not to the user's.
if 'YOLO_CONFIG_DIR' not in os.environ:
    os.environ['YOLO_CONFIG_DIR'] = tempfile.mkdtemp(prefix='kd_dense-yolo-')
    atexit.register(shutil.rmtree, os.environ['YOLO_CONFIG_DIR'], ignore_errors=True)
os.environ['YOLO_OFFLINE'] = 'true'
pytest.importorskip('ultralytics')

from ultralytics.utils import YAML

from tests.yolo.helpers import FAST, build, save_model, small_yaml, write_data


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> Path:
    """A data YAML: 8 training and 4 validation images."""
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='session')
def mask_data(tmp_path_factory) -> Path:
    """The same with polygons."""
    return write_data(tmp_path_factory.mktemp('mask_data'), polygons=True)


@pytest.fixture(scope='session')
def student_yaml(tmp_path_factory):
    """Family (and task) -> a model YAML on disk."""
    folder = tmp_path_factory.mktemp('students')

    def path(family: str = 'yolo11', task: str = '') -> str:
        file = folder / f'{family}n{task}.yaml'
        if not file.exists():
            YAML.save(file, small_yaml(family, 0.125, task))
        return str(file)

    return path


@pytest.fixture(scope='session')
def teacher_file(tmp_path_factory):
    """Family (and task) -> the checkpoint of a teacher, wider than the student."""
    folder = tmp_path_factory.mktemp('teachers')

    def path(family: str = 'yolo11', task: str = '') -> str:
        file = folder / f'{family}{task}.pt'
        if not file.exists():
            save_model(build(family, 0.1875, task, seed=1), file)
        return str(file)

    return path


@pytest.fixture
def write_config(tmp_path, data, student_yaml, teacher_file):
    """Write a config file; by default one epoch of the smallest run with ``Native``."""

    def write(name: str = 'config.py', distillers: dict | None = None, teacher: dict | None = None, **other) -> Path:
        values = {
            'student': student_yaml(),
            'teacher': {'checkpoint': teacher_file(), **(teacher or {})},
            'distillers': distillers or {'native': {'type': 'Native'}},
            'data': str(data),
            'train': dict(FAST),
            **other,
        }
        path = tmp_path / name
        path.write_text('\n'.join(f'{k} = {v!r}' for k, v in values.items() if v is not None))
        return path

    return write
