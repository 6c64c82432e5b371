"""A tiny segmentation config with a cache of its teacher."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from kd_dense.cache.write import WriteOptions, write_cache
from kd_dense.data.scene_drawing import CLASSES
from tests.helpers import tiny

#: Eight images, two views, five records to a shard.
OPTIONS = WriteOptions(views=2, batch_size=2, shard_bytes=13_000, progress=False)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('cache_data') / 'scenes')


@pytest.fixture(scope='session')
def teacher(tmp_path_factory) -> dict:
    config = tiny.segmentor(8)
    return dict(
        config=config, checkpoint=tiny.saved(config, tmp_path_factory.mktemp('cache_teacher') / 't.pth', CLASSES)
    )


@pytest.fixture(scope='session')
def config(scenes, teacher) -> Config:
    """Live: two taps, random crops and flips."""
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=teacher,
        distillers=dict(
            logits=dict(type='LogitKD', temperature=2.0, loss_weight=1.0),
            mimic=dict(type='FeatureMimic', taps='backbone:3'),
        ),
    )
    cfg = tiny.segmentation_run(model, scenes, iterations=6, interval=6)
    cfg.train_dataloader.dataset.serialize_data = False  # collects garbage, which takes longer than all else
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='RandomCrop', crop_size=(48, 48)))
    cfg.train_dataloader.dataset.pipeline.insert(3, dict(type='PhotoMetricDistortion'))
    cfg.model.student.data_preprocessor.size = cfg.model.teacher.config.data_preprocessor.size = (48, 48)
    cfg.custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=False)]
    return cfg


@pytest.fixture(scope='session')
def cache(config, tmp_path_factory) -> str:
    """A complete cache; not to be changed."""
    folder = str(tmp_path_factory.mktemp('cache') / 'cache')
    write_cache(config, folder, OPTIONS)
    return folder


@pytest.fixture
def cached(config, cache) -> Config:
    """The config with the cache."""
    return with_cache(config, cache)


def changed(config: Config, **changes: object) -> Config:
    """A copy with other entries: ``**{'key.inner': value}``."""
    cfg = copy.deepcopy(config)
    cfg.merge_from_dict(changes)
    return cfg


def with_cache(config: Config, folder: str | Path) -> Config:
    return changed(config, **{'model.teacher.cache': str(folder)})


def with_other_classes(cache: str | Path, folder: Path) -> Path:
    """A copy of a cache whose teacher has the same classes in another order."""
    shutil.copytree(cache, folder)
    manifest = json.loads((folder / 'cache.json').read_text())
    manifest['teacher']['classes'].reverse()
    (folder / 'cache.json').write_text(json.dumps(manifest))
    return folder
