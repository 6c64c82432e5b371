"""Random views: what they change, what they leave, and how often."""

import numpy as np
import pytest
import torch

from kd_dense.context import Context
from kd_dense.distillers.multi_view import MultiView
from kd_dense.errors import ConfigError
from kd_dense.teacher import Normalization
from tests.helpers.waits import Waits

IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 'rgb')
STILL = dict(brightness=0, contrast=0, saturation=0, hue=0, mask_ratio=0)


def batch(count=4, size=(64, 96), normalization=IMAGENET):
    pixels = torch.rand(count, 3, *size) * 255
    if normalization is None:
        return pixels
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalization.mean, normalization.std))
    return (pixels - mean) / std


def context(size=(64, 96), **options):
    return Context(canvas=size, **options)


def pixels_of(x, normalization):
    mean, std = (np.array(v)[:, None, None] for v in (normalization.mean, normalization.std))
    return x.double().numpy() * std + mean


def test_about_half_of_the_images_are_changed_and_the_others_are_bit_identical():
    images = batch(400, (8, 8))
    before = images.clone()
    viewed = MultiView(IMAGENET)(images, context((8, 8)))
    assert torch.equal(images, before) and viewed.data_ptr() != images.data_ptr()
    same = (viewed == images).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 20)
    assert torch.equal(MultiView(IMAGENET, prob=0)(images, context((8, 8))), images)
    assert not (MultiView(IMAGENET, prob=1)(images, context((8, 8))) == images).flatten(1).all(1).any()


def test_a_quarter_of_the_patches_is_masked_out():
    images = batch(16, (128, 128)) + 10  # no 0 in it
    viewed = MultiView(IMAGENET, prob=1, **STILL | dict(mask_ratio=0.25), patch=8)(images, context((128, 128)))
    kept = (viewed != 0).all(1)
    torch.testing.assert_close(viewed, images * kept[:, None], rtol=1e-5, atol=1e-4)
    patches = kept.reshape(16, 16, 8, 16, 8).permute(0, 1, 3, 2, 4).flatten(3)
    assert (patches.all(-1) | ~patches.any(-1)).all()  # whole patches
    share = 1 - patches.all(-1).float().mean().item()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / (16 * 256)))
    assert not torch.equal(kept[0], kept[1])


def test_patches_cover_a_size_they_do_not_divide():
    images = batch(2, (70, 33)) + 10
    viewed = MultiView(IMAGENET, prob=1, **STILL | dict(mask_ratio=1))(images, context((70, 33)))
    assert viewed.shape == images.shape and (viewed == 0).all()


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
def test_brightness_and_contrast_in_pixel_values(order):
    """One factor for the whole image, in 0.6..1.4, whatever the normalisation."""
    normalization = Normalization((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), order)
    images = batch(1, (8, 8), normalization) * 0.2  # far from black and white: nothing is cut off
    before = pixels_of(images[0], normalization)
    after = pixels_of(
        MultiView(normalization, prob=1, **STILL | dict(brightness=0.4))(images, context((8, 8)))[0], normalization
    )
    factor = after / before
    assert factor.std() < 1e-4 and 0.6 <= factor.mean() <= 1.4 and abs(factor.mean() - 1) > 1e-3
    after = pixels_of(
        MultiView(normalization, prob=1, **STILL | dict(contrast=0.4))(images, context((8, 8)))[0], normalization
    )
    luma = np.tensordot([0.2989, 0.587, 0.114], before if order == 'rgb' else before[::-1], 1).mean()
    factor = (after - luma) / (before - luma)
    assert np.median(abs(factor - np.median(factor))) < 1e-3 and 0.6 <= np.median(factor) <= 1.4


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
def test_saturation_and_hue_leave_grey_alone(order):
    normalization = Normalization((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), order)
    grey = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8) * 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalization.mean, normalization.std))
    view = MultiView(normalization, prob=1, **STILL | dict(saturation=0.4, hue=0.5))
    torch.testing.assert_close(view((grey - mean) / std, context((8, 8))), (grey - mean) / std, rtol=0, atol=2e-2)
    # a red image turns, and it is red that turns: its brightest channel has its place in the order
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0 if order == 'rgb' else 2] = 200
    after = pixels_of(
        MultiView(normalization, prob=1, **STILL | dict(hue=0.1))((red - mean) / std, context((8, 8)))[0], normalization
    )
    brightest = after.reshape(3, -1).mean(1)
    assert brightest.argmax() == (0 if order == 'rgb' else 2) and sorted(brightest)[1] > 1


def test_padding_stays():
    images = batch(2, (64, 64))
    images[1, :, 40:], images[1, :, :, 48:] = 0, 0
    sizes = torch.tensor([[64, 64], [40, 48]])
    viewed = MultiView(IMAGENET, prob=1, **STILL | dict(brightness=0.4))(images, context((64, 64), image_sizes=sizes))
    assert (viewed[1, :, 40:] == 0).all() and (viewed[1, :, :, 48:] == 0).all()
    assert (viewed[1, :, :40, :48] != images[1, :, :40, :48]).float().mean() > 0.9


def test_unnormalised_images_are_pixels_and_other_channels_are_only_masked():
    images = batch(1, (8, 8), None)
    viewed = MultiView(None, prob=1, **STILL | dict(brightness=0.4))(images, context((8, 8)))
    assert viewed.min() >= 0 and viewed.max() <= 255.001 and (viewed - images).abs().max() > 1
    thermal = torch.rand(1, 1, 64, 64) + 1
    viewed = MultiView(None, prob=1, patch=8)(thermal, context((64, 64)))
    assert ((viewed == thermal) | (viewed == 0)).all() and (viewed == 0).any()


def test_is_reproducible_and_keeps_the_dtype_and_does_not_wait():
    images = batch().half()
    view = MultiView(IMAGENET)
    torch.manual_seed(3)
    first = view(images, context())
    torch.manual_seed(3)
    assert torch.equal(view(images, context()), first) and first.dtype == torch.float16
    with Waits() as waits:
        view(images, context(image_sizes=torch.tensor([[64, 96]] * 4)))
    assert waits.seen == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(prob=1.5), 'prob must lie in 0..1, not 1.5'),
        (dict(hue=0.6), 'hue must lie in 0..0.5, not 0.6'),
        (dict(mask_ratio=-1), 'mask_ratio must lie'),
        (dict(patch=0), 'patch must be a whole number'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MultiView(IMAGENET, **options)
