"""Every config parses, names real files of the toolboxes, and builds what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope

from kd_dense import Distillation
from kd_dense.engine import run
from kd_dense.engine.run import is_distillation, is_yolo, load_config
from kd_dense.errors import ConfigError
from kd_dense.models.build import build_model, forget_pretrained
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / 'configs').rglob('*.py'))


def parsed(path: Path) -> Config | Exception:
    try:
        return Config.fromfile(str(path))
    except Exception as error:
        return error


#: Parsed while tests are collected: what a config distils decides which tests it gets.
PARSED = {path.relative_to(ROOT).as_posix(): parsed(path) for path in FILES}
LOADED = {name: cfg for name, cfg in PARSED.items() if isinstance(cfg, Config)}
DISTILLED = [name for name, cfg in LOADED.items() if is_distillation(cfg)]
#: On the data sets that nobody has by accident, with teachers that the toolboxes publish.
PUBLISHED = [name for name in DISTILLED if '::' in str(LOADED[name].model.teacher.config)]
NAME = re.compile(
    r'(?P<method>[a-z0-9]+)(?:-[a-z]+)?_(?P<teacher>[a-z0-9.-]+)_(?P<student>[a-z0-9.-]+)_\d+[kxe]?_[a-z0-9-]+'
)


def header(name: str) -> str:
    """The comment that a config begins with."""
    lines = (ROOT / name).read_text().splitlines()
    return '\n'.join(lines[: next(i for i, line in enumerate(lines) if not line.startswith('#'))])


def small_size(cfg: Config) -> tuple[int, int]:
    """64 x 64, or what has a position for each of the 900 queries that a two-stage DETR chooses among them."""
    return (256, 256) if cfg.model.student.get('as_two_stage') else tiny.SIZE


def options(cfg: Config) -> dict:
    """The arguments of ``Distillation``, with small images and nothing to download."""
    model = cfg.model.to_dict()
    model.pop('type')
    student = model['student']
    forget_pretrained(student)
    if 'size' in student['data_preprocessor']:
        student['data_preprocessor']['size'] = tiny.SIZE
    return dict(model, probe_size=small_size(cfg))


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_first_class_configs_are_there():
    pairs = {NAME.fullmatch(Path(name).stem).group('teacher', 'student') for name in PUBLISHED}
    assert pairs >= {
        ('segformer-b2', 'segformer-b0'),
        ('pspnet-r101', 'pspnet-r18'),
        ('gfl-r101', 'gfl-r50'),
        ('gfl-r50', 'gfl-r18'),
        ('faster-rcnn-r101', 'faster-rcnn-r50'),
        ('retinanet-x101', 'retinanet-r50'),
        ('retinanet-r101', 'retinanet-r50'),
        ('atss-r101', 'atss-r50'),
        ('mask-rcnn-swin-s', 'mask-rcnn-r50'),
        ('rtmdet-l', 'rtmdet-s'),
        ('dino-swin-l', 'dino-r50'),
    }


def test_every_method_for_detectors_has_a_config():
    types = {method['type'] for name in PUBLISHED for method in LOADED[name].model.distillers.values()}
    assert types >= {'BoxGuidedMimic', 'PKD', 'MGD', 'LocalizationKD', 'QueryKD', 'RoIKD', 'RKD', 'DPK'}


def test_hooks_of_the_stock_config_stay():
    """A list in a config replaces the one below it: RTMDet's moving average would be gone."""
    (cfg,) = (LOADED[name] for name in PUBLISHED if LOADED[name].model.student.get('type') == 'RTMDet')
    hooks = {hook['type'] for hook in cfg.custom_hooks}
    assert hooks == {'EMAHook', 'PipelineSwitchHook', 'kd_dense.DistillationHook'}


@pytest.mark.parametrize('name', PARSED)
def test_every_file__is_a_config(name):
    if isinstance(PARSED[name], Exception):
        raise PARSED[name]
    assert len(PARSED[name]) > 0


@pytest.mark.parametrize('name', [name for name, cfg in LOADED.items() if is_yolo(cfg)])
def test_yolo_configs__are_read(name):
    pytest.importorskip('ultralytics')
    from kd_dense.yolo.config import read

    config = read(LOADED[name])
    assert config.student
    if config.distillers:
        assert config.teacher and config.build_distillers().methods


@pytest.mark.parametrize('name', DISTILLED)
def test_header__has_the_command(name):
    tool = 'compare' if name.startswith('configs/demo') else 'train'
    text = header(name)
    assert f'python tools/{tool}.py {name}' in text.replace('\\\n#', '')
    for path in re.findall(r'configs/\S+\.py', text):
        assert (ROOT / path).is_file(), path
    for folder in re.findall(r'work_dirs/([\w.-]+)/(?:iter|epoch)', text):
        assert folder == Path(name).stem


@pytest.mark.parametrize('name', [name for name in DISTILLED if not name.startswith('configs/demo')])
def test_name__says_what_is_distilled(name):
    parts = NAME.fullmatch(Path(name).stem)
    assert parts, '{method}_{teacher}_{student}_{schedule}_{dataset}.py, with METHOD-VARIANT where there are several'
    assert parts['method'] in Path(name).parent.name.replace('_', '')
    types = [method['type'].lower() for method in LOADED[name].model.distillers.values()]
    assert any(parts['method'] in kind for kind in types)


@pytest.mark.parametrize('name', PUBLISHED)
def test_teacher__is_the_published_one(name):
    """The checkpoint is the one that the toolbox's model index names for this config, and so is the score."""
    from mmengine.hub.hub import _get_cfg_metainfo
    from mmengine.utils import get_installed_path

    teacher = LOADED[name].model.teacher
    package, _, path = teacher.config.partition('::')
    meta = _get_cfg_metainfo(get_installed_path(package), path)
    assert Path(meta['Weights']).name == Path(teacher.checkpoint).name
    results = meta['Results'][0] if isinstance(meta['Results'], list) else meta['Results']
    score = results['Metrics'].get('mIoU', results['Metrics'].get('box AP'))
    assert f' {score} ' in header(name).replace('\n', ' ')
    project = {'mmseg': 'mmsegmentation', 'mmdet': 'mmdet'}[package]
    assert f'mim download {project} --config {Path(path).stem} --dest checkpoints' in header(name)


# -- what is missing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', DISTILLED)
def test_missing__data_set_then_teacher(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is neither
    cfg = load_config(str(ROOT / name))
    with pytest.raises(ConfigError) as error:
        run.train(cfg, str(tmp_path))
    dataset, key = cfg.train_dataloader.dataset, 'train_dataloader.dataset'
    if 'datasets' in dataset:  # several behind one another
        dataset, key = dataset.datasets[0], f'{key}.datasets[0]'
    assert str(error.value).startswith(f'{key}.data_root: there is no folder {dataset.data_root};')
    monkeypatch.setattr(run, 'check_data', lambda *_: None)
    with pytest.raises(ConfigError) as error:
        run.train(cfg, str(tmp_path))
    assert str(error.value).startswith('teacher.checkpoint: ')
    assert cfg.model.teacher.checkpoint in str(error.value) and '\n' not in str(error.value)


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_build__student_teacher_and_distillers_take_a_step(name, tmp_path):
    cfg = LOADED[name]
    init_default_scope(cfg.default_scope)
    arguments = options(cfg)
    teacher = build_model(arguments['teacher']['config'], 'teacher', pretrained=False)
    arguments['teacher']['checkpoint'] = str(tmp_path / 'teacher.pth')
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    try:
        model = revert_sync_batchnorm(Distillation(**arguments)).train()  # as the runner does with one process
    finally:
        (tmp_path / 'teacher.pth').unlink()  # hundreds of megabytes
    assert {k: v.shape for k, v in model.teacher.model.state_dict().items()} == {
        k: v.shape for k, v in teacher.state_dict().items()
    }
    stock = load_config(str(ROOT / name)).model.student
    assert list(model.state_dict()) == list(build_model(stock, 'student').state_dict())

    model.progress = 0.5  # whatever has a schedule has begun
    segmentation = cfg.default_scope == 'mmseg'
    masks = 'mask_head' in cfg.model.student.get('roi_head', {})
    height, width = small_size(cfg)
    sizes = ((height, width), (3 * height // 4, width))
    batch = tiny.segmentation_batch(classes=19) if segmentation else tiny.detection_batch(sizes, 80, masks=masks)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    logs = model.train_step(batch, wrapper)
    model.distillers.verify_gradients()
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in logs.values())
    for distiller in arguments['distillers']:
        own = [value for name, value in logs.items() if name.startswith(f'kd.{distiller}.')]
        assert own and all(value > 0 for value in own)
