"""The configs of pre-training: what they name exists, and models of it can be built."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.optim import build_optim_wrapper
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


def test_schedule_of_the_paper(monkeypatch):
    """AdamW, clipping at 5; no weight decay on what has one dimension, nor on the biases of the attention."""
    stub_cache(monkeypatch)
    (path,) = (path for path in FILES if 'tinyvit' in path.stem)
    cfg = load_config(str(path))
    init_default_scope(cfg.default_scope)
    model = BackbonePretraining(**{key: value for key, value in cfg.model.items() if key != 'type'})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW and wrapper.clip_grad_kwargs == dict(max_norm=5.0)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith('attention_biases')
        assert decay[id(parameter)] == (0.0 if spared else 0.01), name
    # of 1024 images a step: 2.5e-4, 5e-7 at the begin and 5e-6 at the end for each 512
    optimizer, (warm_up, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.lr, optimizer.lr * warm_up.start_factor, cosine.eta_min) == pytest.approx((5e-4, 1e-6, 1e-5))
    assert (warm_up.end, cosine.begin, cosine.end, cfg.train_cfg.max_epochs) == (5, 5, 90, 90)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_header__has_the_commands(path):
    text = path.read_text()
    assert f'name={path.stem}\n' in text and 'python tools/cache_teacher.py configs/pretraining/$name.py' in text
    for named in re.findall(r'configs/[\w/.-]+\.py', text):
        assert (ROOT / named).is_file(), named
    folders = re.findall(r'work_dirs/(softlabels[\w.-]+)/', text)
    assert folders and set(folders) == {path.stem}
