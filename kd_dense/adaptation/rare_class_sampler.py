"""Draw images with rare classes more often."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from kd_dense.adaptation.paired import PairedDataset
from kd_dense.adaptation.pseudo_maps import sampling_probabilities
from kd_dense.errors import ConfigError
from kd_dense.registry import DATA_SAMPLERS, TRANSFORMS


@DATA_SAMPLERS.register_module()
class RareClassSampler(Sampler):
    """An endless order in which every image is drawn for the sake of a class, and rare classes have more turns.

    A class is drawn by :func:`~kd_dense.adaptation.sampling_probabilities`, then one of the images with at least
    ``min_pixels`` of it, evenly (the images where it occurs at all, where none has so many). Of a
    :class:`~kd_dense.adaptation.paired.PairedDataset` that is the source image; the target image, whose labels nobody
    knows, is drawn evenly. Segmentation data sets only. The label maps are read once, when training starts.

    Source: rare class sampling, Hoyer et al., "DAFormer", CVPR 2022, section 3.3; ``temperature`` and ``min_pixels`` as
    in the authors' code, which counts in images of 1024 x 512 pixels and also draws the crop anew up to ten times until
    it shows the class. We do not.

    Args:
        dataset: filled in by MMEngine.
        temperature: the lower, the more turns the rarest class has.
        min_pixels: of the class in the label map as it is on the disk.
        seed: ``None``: that of MMEngine's ``randomness``, shared by all processes.

    Raises:
        ConfigError: a data set without label maps, or without any class in them.
    """

    def __init__(
        self, dataset: Any, temperature: float = 0.01, min_pixels: int = 3000, seed: int | None = None
    ) -> None:
        if min_pixels < 1:
            raise ConfigError(f'train_dataloader.sampler.min_pixels: must be at least 1, not {min_pixels!r}')
        self.rank, self.processes = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.dataset = dataset
        labelled, self.partners = (
            (dataset.datasets[0], len(dataset.datasets[1])) if isinstance(dataset, PairedDataset) else (dataset, 1)
        )
        counts = pixels_of_classes(labelled)
        self.probabilities = sampling_probabilities(counts.sum(0), temperature)
        enough = counts >= counts.amax(0).clamp(max=min_pixels)
        self.images = [column.nonzero().flatten() for column in (enough & (counts > 0)).T]

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """Indices of this process."""
        return islice(self._all(), self.rank, None, self.processes)

    def set_epoch(self, epoch: int) -> None:
        """An endless order has no epochs."""

    def _all(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            images = self.images[int(torch.multinomial(self.probabilities, 1, generator=generator))]
            image = int(images[torch.randint(len(images), (1,), generator=generator)])
            partner = int(torch.randint(self.partners, (1,), generator=generator))
            yield image * self.partners + partner


def pixels_of_classes(dataset: Any) -> Tensor:
    """Pixels of each class in each label map of a segmentation data set: ``[N, C]``.

    Raises:
        ConfigError: a data set without label maps.
    """
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    classes = len(getattr(dataset, 'metainfo', {}).get('classes') or ())
    if not classes or not all(info.get('seg_map_path') for info in infos):
        raise ConfigError(
            'train_dataloader.sampler: RareClassSampler counts the classes in label maps, and '
            f'{type(dataset).__name__} has none; set its data_prefix.seg_map_path, or use an InfiniteSampler'
        )
    load = TRANSFORMS.build(dict(type='mmseg.LoadAnnotations'))

    def count(info: dict) -> np.ndarray:
        labels = load(info)['gt_seg_map'].ravel()
        return np.bincount(labels[labels < classes], minlength=classes)

    with ThreadPoolExecutor() as pool:  # decoding does not hold Python's lock
        found = list(tqdm(pool.map(count, infos), total=len(infos), desc='counting classes', unit='image', leave=False))
    return torch.from_numpy(np.stack(found))
