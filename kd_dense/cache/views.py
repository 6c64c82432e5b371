"""A bank of views: a fixed number of augmented versions of every training sample, each replayed from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from torch import Tensor
from torch.utils.data import Sampler

from kd_dense.cache import fingerprint
from kd_dense.cache.teacher import FIELD, as_field
from kd_dense.errors import ConfigError
from kd_dense.registry import DATA_SAMPLERS, DATASETS


def view_seed(seed: int, index: int, view: int) -> int:
    """The seed of one view of one sample, 32 bits. It follows from the arguments alone, in every process."""
    return random.Random(f'view {seed} {index} {view}').getrandbits(32)


@contextmanager
def replayed(seed: int) -> Iterator[None]:
    """Inside, Python, NumPy and torch (CPU) draw what ``seed`` says; afterwards their states are as before.

    Unlike ``torch.manual_seed`` it leaves the generators of GPUs alone: pipelines run on the CPU, often in a forked
    worker that must not touch a GPU, and the student's dropout is drawn on the GPU.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@DATASETS.register_module()
class ViewBank:
    """A data set of which every sample has ``views`` augmented versions and no more.

    Item ``index + view * len(self)`` is that view of the sample: the whole ``dataset[index]`` runs under
    :func:`view_seed`, with what it draws to find another image where a pipeline returns none. So it is the same in
    every epoch, process and run. :class:`ViewSampler` chooses the views.

    Everything else is looked up on the wrapped data set.

    Args:
        dataset: config of a data set of MMEngine, or the data set.
        views: versions of each sample, at least 1.
        seed: of all views.
    """

    #: Where a config says what the samples are; for errors.
    key = 'train_dataloader.dataset'

    def __init__(self, dataset: Mapping | Any, views: int, seed: int = 0) -> None:
        if not isinstance(views, int) or views < 1:
            raise ConfigError(f'views: must be a whole number of at least 1, not {views!r}')
        self.dataset = MMENGINE_DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()
        self.views, self.seed = views, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict:
        view, index = divmod(int(item), len(self))
        return self.replay(index, view)

    def replay(self, index: int, view: int) -> dict:
        """What the pipeline makes of sample ``index`` in this view."""
        with replayed(view_seed(self.seed, index, view)):
            return self.dataset[index]

    def image(self, sample: dict) -> Tensor:
        """The image of a sample as the pipeline returned it."""
        return sample['inputs']

    def images(self) -> str:
        """A hash of the names of the images, in their order, and of how many objects each is said to have."""
        return fingerprint.images(self.dataset)

    def attach(self, sample: dict, tensors: Mapping[str, Tensor]) -> None:
        """Put what is kept of the teacher's outputs for a sample where the model finds it."""
        if 'data_samples' in sample:
            sample['data_samples'].set_field(as_field(tensors), FIELD)
        else:  # an image alone: no toolbox is told anything about it
            sample[FIELD] = dict(tensors)

    def get_data_info(self, item: int) -> dict:
        """Of the sample, whichever view is meant: what samplers that group by aspect ratio ask for."""
        return self.dataset.get_data_info(int(item) % len(self))

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):  # while being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


@DATA_SAMPLERS.register_module()
class ViewSampler(Sampler):
    """The order of another sampler, with a view for every sample that is drawn: pass ``p`` sees view ``p + index``.

    Both modulo the number of views: each sample goes through all of its views before one comes again, and a pass has
    samples of every view. The views do not depend on worker processes, and a resumed run, which draws what is done
    again, goes on with the right ones.

    Args:
        sampler: config of the sampler, or the sampler; it draws as it would without views.
        dataset: a :class:`ViewBank`.
        seed: of the sampler.
    """

    def __init__(self, sampler: Mapping | Sampler, dataset: ViewBank, seed: int | None = None) -> None:
        if isinstance(sampler, Mapping):
            sampler = MMENGINE_DATA_SAMPLERS.build(dict(sampler), default_args=dict(dataset=dataset, seed=seed))
        self.sampler = sampler
        self.dataset = dataset
        self._drawn = 0

    def __iter__(self) -> Iterator[int]:
        count, views = len(self.dataset), self.dataset.views
        rank, processes = get_dist_info()
        for index in self.sampler:
            # samplers without an epoch (InfiniteSampler) deal out one endless order to the processes in turn
            done = getattr(self.sampler, 'epoch', (self._drawn * processes + rank) // count)
            self._drawn += 1
            yield index + count * ((done + index) % views)

    def __len__(self) -> int:
        return len(self.sampler)

    def begin(self, passes: int) -> None:
        """Go on as if so many passes had been drawn: for a resumed run that does not draw them again."""
        self._drawn = passes * len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Hand the number of the epoch on."""
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)
