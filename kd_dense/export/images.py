"""Images to compare outputs on: of the validation set, of a folder, or noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from torch import Tensor
from torch.nn.functional import interpolate

from kd_dense.engine.run import check_data
from kd_dense.errors import ConfigError
from kd_dense.export.options import NOISE, ExportOptions


def sample_images(cfg: Config, options: ExportOptions) -> tuple[list[Tensor], str]:
    """Images as the config's test pipeline gives them to the model.

    Args:
        cfg: the student's stock config.

    Returns:
        Images ``[3, H, W]``, 0..255, in the channel order of the pipeline (BGR, unless it says otherwise); and what
        they are, in words.

    Raises:
        ConfigError: the validation set is not there, or an image can not be read.
    """
    if options.images == NOISE:
        size = options.size or _noise_size(cfg)
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
        return list(image), '2 images of noise'
    scope = cfg.get('default_scope', 'mmengine')
    with DefaultScope.overwrite_default_scope(scope):
        if options.count is None:
            return _of_folder(cfg, options)
        if (cfg.get('val_dataloader') or {}).get('dataset') is None:
            raise ConfigError('val_dataloader: the config has none; name a folder of images with --images FOLDER')
        try:
            check_data(cfg, ('val_dataloader',))
        except ConfigError as error:
            raise ConfigError(f'{error}; or name a folder of images with --images FOLDER') from None
        dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, _scope_=scope))
        count = min(options.count, len(dataset))
        if not count:
            raise ConfigError('val_dataloader.dataset: has no images; name a folder of images with --images FOLDER')
        chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
        return [_checked(dataset[int(i)]) for i in chosen], f'{count} of {len(dataset)} validation images'


def _of_folder(cfg: Config, options: ExportOptions) -> tuple[list[Tensor], str]:
    """The images of the folder through the test pipeline, without its annotations."""
    part = cfg.get('val_dataloader') or cfg.get('test_dataloader') or {}
    steps = (part.get('dataset') or {}).get('pipeline')
    if not steps:
        raise ConfigError('val_dataloader.dataset.pipeline: the config has none, so how to read images is not known')
    steps = [step for step in copy.deepcopy(steps) if 'Annotations' not in str(step.get('type', ''))]
    pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    files = options.files()
    images = []
    for i, path in enumerate(files):
        try:
            images.append(_checked(pipeline({'img_path': str(path), 'img_id': i, 'seg_fields': []})))
        except (OSError, ValueError, AttributeError, AssertionError) as error:
            raise ConfigError(f'--images: {path} can not be read as an image: {error}') from error
    return images, f'{len(files)} images of {options.images}'


def _checked(packed: Any) -> Tensor:
    image = packed['inputs'] if isinstance(packed, dict) else None
    if not isinstance(image, Tensor) or image.dim() != 3:
        raise ConfigError(
            'val_dataloader.dataset.pipeline: must give one image per item, as a tensor [3, H, W]; name a config '
            'without test-time augmentation'
        )
    return image


def _noise_size(cfg: Config) -> tuple[int, int]:
    size = (cfg.model.get('data_preprocessor') or {}).get('size')
    if size is None:
        raise ConfigError('--size: give height and width of the input, which noise does not have')
    return tuple(size)


def fit(images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Images resized to ``size`` where they have another one, as a batch ``[N, 3, H, W]``, float32, 0..255."""
    batch = []
    for image in images:
        image = image[None].float()
        if tuple(image.shape[2:]) != tuple(size):
            image = interpolate(image, size, mode='bilinear', align_corners=False, antialias=True).round()
        batch.append(image.clamp(0, 255))
    return torch.cat(batch)


def other_size(size: tuple[int, int]) -> tuple[int, int]:
    """Another size than ``size``, with another ratio of the sides, in multiples of 32."""
    height, width = (max(64, round(n * share / 32) * 32) for n, share in zip(size, (0.75, 0.5)))
    return (height, width if (height, width) != tuple(size) else width + 32)
