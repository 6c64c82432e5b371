"""The training data set that brings along what a teacher gave for its views."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from kd_dense.cache import fingerprint
from kd_dense.cache.store import StoredCache
from kd_dense.cache.views import ViewBank
from kd_dense.errors import ConfigError
from kd_dense.registry import DATASETS


class WithOutputs:
    """The views of a cache and, with each, the teacher's outputs. They are read where the view is made, by the workers.

    Mixed into a bank of views.

    Args:
        dataset: the data set from which the cache was written, as the bank takes it.
        cache: folder of the cache; it says how many views there are and from which seed.
        outputs: bring the teacher's outputs along; without them a student trains alone on the same views.

    Raises:
        ConfigError: the cache is not complete, or the data set has other images.
    """

    def __init__(self, dataset: Mapping | Any, cache: str, outputs: bool = True) -> None:
        self.cache = StoredCache.load(cache)
        manifest = self.cache.manifest
        super().__init__(dataset, manifest.views, manifest.seed)
        self.outputs = outputs
        fingerprint.check(manifest.fingerprint, {'images': self.images()}, self.cache.folder, self.key)

    def __getitem__(self, item: int) -> dict:
        sample = super().__getitem__(item)
        if self.outputs:
            view, index = divmod(int(item), len(self))
            self.attach(sample, self.cache.read(index, view).tensors)
        return sample


@DATASETS.register_module()
class CachedTeacherDataset(WithOutputs, ViewBank):
    """For MMEngine: ``dataset`` is a config, or the data set itself."""


def use_cache(cfg: Config, outputs: bool = True) -> Config:
    """A config whose training data set gives the views of ``model.teacher.cache``, each with the teacher's outputs.

    ``tools/train.py`` does this by itself. Give the result to MMEngine's runner.

    Args:
        cfg: left as it is. One without such a cache is returned as it is.
        outputs: ``False``: the same views, but without the outputs.
    """
    folder = cache_of(cfg)
    if folder is None:
        return cfg
    cfg = copy.deepcopy(cfg)
    loader = cfg.train_dataloader
    sampler = loader.get('sampler')
    if not isinstance(sampler, Mapping):
        raise ConfigError("train_dataloader.sampler: teacher.cache needs one, such as dict(type='InfiniteSampler')")
    # a config that has been here before, or that had views without a cache
    plain = sampler.sampler if str(sampler.type).endswith('ViewSampler') else sampler
    loader.sampler = dict(type='kd_dense.ViewSampler', sampler=plain)
    loader.dataset = dict(
        type='kd_dense.CachedTeacherDataset', dataset=fingerprint.plain_dataset(cfg), cache=folder, outputs=outputs
    )
    return cfg


def cache_of(cfg: Mapping) -> str | None:
    """The folder of the cache that a config names in ``model.teacher`` (YOLO: ``teacher``); ``None``: it names none."""
    teacher = (cfg.get('model') or cfg).get('teacher')
    return (teacher.get('cache') or None) if isinstance(teacher, Mapping) else None
