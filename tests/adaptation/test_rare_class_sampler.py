"""Which images are drawn, against frequencies worked out by hand."""

from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS, DefaultScope

from kd_dense.adaptation.paired import PairedDataset
from kd_dense.adaptation.rare_class_sampler import RareClassSampler, pixels_of_classes
from kd_dense.errors import ConfigError


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """Five scenes of 8 x 8: class 1 in all, class 2 in two of them (20 pixels, 4 pixels), class 3 in one (2 pixels)."""
    root = tmp_path_factory.mktemp('rare')
    for folder in ('images', 'labels'):
        (root / folder).mkdir()
    maps = np.ones((5, 64), np.uint8)
    maps[:, :4] = 255
    maps[1, 10:30] = 2
    maps[2, 10:14] = 2
    maps[4, 10:12] = 3
    for i, labels in enumerate(maps):
        cv2.imwrite(str(root / 'images' / f'{i}_leftImg8bit.png'), np.zeros((8, 8, 3), np.uint8))
        cv2.imwrite(str(root / 'labels' / f'{i}_gtFine_labelTrainIds.png'), labels.reshape(8, 8))
    config = dict(
        type='kd_dense.SceneDataset',
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[],
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        return DATASETS.build(config)


COUNTS = [[0, 60, 0, 0], [0, 40, 20, 0], [0, 56, 4, 0], [0, 60, 0, 0], [0, 58, 0, 2]]


def test_pixels(dataset):
    assert pixels_of_classes(dataset)[:, :4].tolist() == COUNTS


def test_frequencies(dataset):
    sampler = RareClassSampler(dataset, temperature=0.5, min_pixels=10, seed=3)
    shares = np.array(COUNTS).sum(0)[1:] / 300
    turns = np.exp((1 - shares) / 0.5)
    turns /= turns.sum()
    # Class 1: all five evenly. Class 2: only the one with 20 pixels. Class 3: none has ten, so the one that has any.
    expected = np.full(5, turns[0] / 5)
    expected[1] += turns[1]
    expected[4] += turns[2]
    drawn = np.bincount(list(islice(sampler, 4000)), minlength=5) / 4000
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(0.25 / 4000)
    assert torch.allclose(sampler.probabilities[1:4], torch.tensor(turns, dtype=torch.float64))


def test_pairs(dataset):
    """The source image is drawn for its class, the target image evenly; two processes take turns."""
    paired = object.__new__(PairedDataset)
    paired.datasets = [dataset, [None] * 3]
    sampler = RareClassSampler(paired, temperature=0.5, min_pixels=10, seed=1)
    order = list(islice(sampler, 600))
    assert order == list(islice(sampler, 600))
    source, target = np.divmod(order, 3)
    assert (np.bincount(source, minlength=5)[[1, 4]] > 60).all() and len(paired) == 15
    assert (np.bincount(target, minlength=3) > 140).all()
    parts = []
    for rank in (0, 1):
        sampler.rank, sampler.processes = rank, 2
        parts.append(list(islice(sampler, 300)))
    assert [i for pair in zip(*parts, strict=True) for i in pair] == order


def test_found_by_name(dataset):
    """With MMEngine's own call, from the toolbox's scope."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        sampler = DATA_SAMPLERS.build(
            dict(type='kd_dense.RareClassSampler'), default_args=dict(dataset=dataset, seed=5)
        )
    assert sampler.seed == 5


def test_refused(dataset):
    with pytest.raises(ConfigError, match='RareClassSampler counts the classes in label maps'):
        RareClassSampler([], seed=0)
    with pytest.raises(ConfigError, match='min_pixels: must be at least 1'):
        RareClassSampler(dataset, min_pixels=0, seed=0)
