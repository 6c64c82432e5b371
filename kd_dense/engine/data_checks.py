"""Data sets that hold nothing, and image files that can not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader

from kd_dense.data.wrapped import innermost
from kd_dense.errors import ConfigError


@contextmanager
def named_if_empty(cfg: Mapping, part: str) -> Iterator[None]:
    """Around the building of a data set: MMEngine packs its entries into an array, and fails where there are none.

    Args:
        cfg: of the data loader.
        part: config key of the loader: ``'train_dataloader'``, for example.

    Raises:
        ConfigError: there are no images.
    """
    try:
        yield
    except ValueError as error:
        if str(error) != 'need at least one array to concatenate':
            raise
        dataset = cfg['dataset']
        raise _empty(part, str(dataset.get('type')), [dataset.get('data_root'), *_places(dataset)]) from error


def check_loader(loader: DataLoader, part: str) -> DataLoader:
    """See to it that a data loader of MMEngine yields batches, and that a bad file is named when it is read.

    Args:
        part: config key of the loader.

    Raises:
        ConfigError: there are no images, or fewer than a batch where incomplete batches are dropped.
    """
    for dataset in innermost(loader.dataset):
        if len(dataset) == 0:
            raise _empty(part, type(dataset).__name__, _places(vars(dataset)))
        if hasattr(dataset, 'pipeline') and not isinstance(dataset.pipeline, NamesBadFiles):
            dataset.pipeline = NamesBadFiles(dataset.pipeline)
    # an endless sampler begins anew and fills every batch
    sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
    sampler = getattr(sampler, 'sampler', sampler)  # inside of what chooses views
    if not isinstance(sampler, InfiniteSampler) and len(loader) == 0:
        raise ConfigError(
            f'{part}: {len(loader.dataset)} images do not fill one batch of {loader.batch_size}, and drop_last leaves '
            f'incomplete ones out; lower {part}.batch_size'
        )
    return loader


def _empty(part: str, kind: str, places: list[str | None]) -> ConfigError:
    where = ', '.join(str(place) for place in places if place) or 'its folders'
    return ConfigError(
        f'{part}.dataset: {kind} has no images; check {where}, the file name endings and what filter_cfg leaves out'
    )


def _places(settings: Mapping) -> list[str | None]:
    prefixes = settings.get('data_prefix') or {}
    return [v for v in prefixes.values() if isinstance(v, str)] + [settings.get('ann_file')]


class NamesBadFiles:
    """A data pipeline that, when it fails, says which file of the sample is missing or no image.

    Args:
        pipeline: the pipeline of an MMEngine data set. Its attributes are those of this object too.
    """

    def __init__(self, pipeline: Callable[[dict], dict | None]) -> None:
        self.pipeline = pipeline

    def __call__(self, sample: dict) -> dict | None:
        # kept, because transforms replace entries
        files = [sample[key] for key in ('img_path', 'seg_map_path') if isinstance(sample.get(key), str)]
        try:
            return self.pipeline(sample)
        except Exception as error:
            for file in files:
                if reason := _wrong_with(file):
                    raise ConfigError(
                        f'dataset: {file} {reason}; restore the file, or take it out of the data set'
                    ) from error
            raise  # the files are good: something else is wrong

    def __getattr__(self, name: str) -> Any:
        if name == 'pipeline':  # while being unpickled
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __repr__(self) -> str:
        return repr(self.pipeline)


def _wrong_with(file: str) -> str | None:
    if '://' in file:
        return None
    if not Path(file).is_file():
        return 'is missing'
    try:
        good = cv2.imread(file, cv2.IMREAD_UNCHANGED) is not None
    except cv2.error:
        good = False
    return None if good else 'is no image that can be decoded'
