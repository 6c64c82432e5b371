"""The configs of pre-training: what they name exists, and models of it can be built."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.registry import init_default_scope
from torchvision.models import get_model_weights

from kd_dense import BackbonePretraining
from kd_dense.cache.store import Manifest, StoredCache
from kd_dense.engine.run import load_config
from kd_dense.pretraining import TorchvisionTransforms

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / 'configs' / 'pretraining').glob('*.py'))
WIDTHS = {'mit-b0': 256, 'tinyvit-5m': 320, 'r18-w8': 64}
NAME = re.compile(r'softlabels_(?P<teacher>[a-z0-9-]+)_(?P<student>[a-z0-9-]+)_\d+e?_[a-z]+-\d+x\d+')


def stub_cache(monkeypatch) -> None:
    """Of a teacher with 1000 classes, wherever the config looks for it."""
    manifest = Manifest(1, 1, 0, 1, {'logits': 1}, {'logits': [100, 1000]}, {}, {}, complete=True, rows=True)
    monkeypatch.setattr(StoredCache, 'load', classmethod(lambda cls, folder: cls(Path(folder), manifest)))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_config(path, monkeypatch):
    stub_cache(monkeypatch)
    cfg = load_config(str(path))
    parts = NAME.fullmatch(path.stem)
    assert parts
    # the teacher's file is the one that torchvision publishes for this model
    module, _, function = cfg.model.teacher.config.partition(':')
    assert module == 'torchvision.models' and function == parts['teacher']
    with torch.device('meta'):
        assert isinstance(getattr(importlib.import_module(module), function)(), torchvision.models.ResNet)
    files = [weights.url.rpartition('/')[2] for weights in get_model_weights(function)]
    assert Path(cfg.model.teacher.checkpoint).name in files
    # the student is the one in the name, and its head has the teacher's classes
    init_default_scope(cfg.default_scope)
    model = BackbonePretraining(**{key: value for key, value in cfg.model.items() if key != 'type'})
    assert tuple(model.head.weight.shape) == (1000, WIDTHS[parts['student']])
    # the pipeline gives the size in the name
    (augmentation,) = (t for t in cfg.train_dataloader.dataset.pipeline if 'Torchvision' in t.type)
    image = torch.zeros(100, 120, 3, dtype=torch.uint8).numpy()
    size = int(path.stem.rpartition('x')[2])
    assert TorchvisionTransforms(augmentation.transforms).transform({'img': image})['img'].shape == (size, size, 3)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_header__has_the_commands(path):
    text = path.read_text()
    assert f'name={path.stem}\n' in text and 'python tools/cache_teacher.py configs/pretraining/$name.py' in text
    for named in re.findall(r'configs/[\w/.-]+\.py', text):
        assert (ROOT / named).is_file(), named
    folders = re.findall(r'work_dirs/(softlabels[\w.-]+)/', text)
    assert folders and set(folders) == {path.stem}
