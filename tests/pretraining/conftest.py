"""A tiny pre-training: eight scenes, two views, a classifier of 150 classes, a ResNet-18 of width 4."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from mmengine.config import Config

from kd_dense.cache.write import WriteOptions, write_cache
from tests.helpers import tiny
from tests.pretraining import teachers

OPTIONS = WriteOptions(views=2, batch_size=3, shard_bytes=4000, progress=False)
AUGMENTATIONS = [
    dict(type='RandomResizedCrop', size=32, scale=(0.3, 1.0), interpolation='bicubic'),
    dict(type='RandomHorizontalFlip'),
    dict(type='RandAugment', num_ops=1, magnitude=5),
]


@pytest.fixture(scope='session')
def config(tmp_path_factory) -> Config:
    """Six iterations, a checkpoint every three."""
    folder = tmp_path_factory.mktemp('pretraining')
    tiny.scenes(folder / 'scenes')
    student = tiny.segmentor(4)
    student['backbone'].update(frozen_stages=1, norm_eval=True)  # as in stock configs, for pretrained weights
    return Config(
        dict(
            default_scope='mmengine',
            model=dict(
                type='kd_dense.BackbonePretraining',
                student=student,
                teacher=dict(
                    config='tests.pretraining.teachers:small',
                    checkpoint=teachers.saved(folder / 'teacher.pth'),
                    cache=str(folder / 'cache'),
                ),
            ),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                collate_fn=dict(type='default_collate'),
                sampler=dict(type='InfiniteSampler', shuffle=True),
                dataset=dict(
                    type='kd_dense.ImageFolder',
                    data_root=str(folder / 'scenes'),
                    data_prefix=dict(img_path='leftImg8bit/train'),
                    serialize_data=False,  # collects garbage, which takes longer than all else
                    pipeline=[
                        dict(type='LoadImageFromFile'),
                        dict(type='kd_dense.TorchvisionTransforms', transforms=AUGMENTATIONS),
                        dict(type='kd_dense.PackImage'),
                    ],
                ),
            ),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01)),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=6),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3),
            ),
            log_processor=dict(by_epoch=False, window_size=1),
            env_cfg=dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=1)),
            randomness=dict(seed=0),
        )
    )


@pytest.fixture(scope='session')
def cached(config) -> Config:
    """The config, with its cache written; not to be changed."""
    write_cache(config, config.model.teacher.cache, OPTIONS)
    return config


def changed(config: Config, **changes: object) -> Config:
    """A copy with other entries: ``**{'key.inner': value}``."""
    cfg = copy.deepcopy(config)
    cfg.merge_from_dict(changes)
    return cfg


def cache_folder(config: Config) -> Path:
    return Path(config.model.teacher.cache)
