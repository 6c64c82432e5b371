"""Pipelines of unlabelled images."""

import numpy as np
import pytest
import torch

from kd_dense import ConfigError
from kd_dense.cache.views import replayed
from kd_dense.pretraining import PackImage, TorchvisionTransforms
from tests.pretraining.conftest import AUGMENTATIONS

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_transforms__see_rgb_and_give_bgr():
    grey = TorchvisionTransforms([dict(type='Grayscale', num_output_channels=3)])
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 2] = 200  # red, in BGR
    found = grey.transform(dict(img=image))['img']
    assert found.shape == (2, 2, 3) and set(found.flatten()) == {59}  # 0.2989 of it; of blue it would be 0.114
    same = TorchvisionTransforms([dict(type='RandomHorizontalFlip', p=1.0)]).transform(dict(img=IMAGE))
    assert np.array_equal(same['img'], IMAGE[:, ::-1]) and same['img_shape'] == (40, 50)


def test_replay__is_exact():
    transforms = TorchvisionTransforms(AUGMENTATIONS)

    def view(seed):
        with replayed(seed):
            return transforms.transform(dict(img=IMAGE))['img']

    first = [view(seed) for seed in range(6)]
    assert first[0].shape == (32, 32, 3)
    assert all(np.array_equal(view(seed), first[seed]) for seed in reversed(range(6)))
    assert all(not np.array_equal(first[0], other) for other in first[1:])


def test_pack__keeps_the_bytes():
    found = PackImage().transform(dict(img=IMAGE, img_path='x'))
    assert list(found) == ['inputs'] and found['inputs'].dtype == torch.uint8
    assert np.array_equal(found['inputs'].numpy(), IMAGE.transpose(2, 0, 1))


@pytest.mark.parametrize(
    'transform, sentence',
    [
        (dict(type='RandomResizeCrop', size=4), r"transforms\[0\]: .* has no 'RandomResizeCrop'; did you mean"),
        (dict(type='functional'), r"has no 'functional'"),
        (dict(type='RandomResizedCrop', sizes=4), r"RandomResizedCrop has no option 'sizes'; did you mean 'size'"),
        (dict(type='RandomResizedCrop'), r"needs the option 'size'"),
        (dict(type='Resize', size=4, interpolation='cubic'), r"interpolation: unknown 'cubic'; did you mean 'bicubic'"),
    ],
)
def test_what_can_not_work__is_one_sentence(transform, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TorchvisionTransforms([transform])


def test_image_that_is_no_longer_of_8_bits__one_sentence():
    with pytest.raises(ConfigError, match='must give an RGB image of 8 bits; leave out what normalises'):
        TorchvisionTransforms([dict(type='Grayscale')]).transform(dict(img=IMAGE))
