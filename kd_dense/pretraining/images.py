"""Pipelines of unlabelled images: torchvision's augmentations, and what the model wants of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from torchvision.transforms import InterpolationMode, v2

from kd_dense.errors import ConfigError, closest
from kd_dense.registry import TRANSFORMS, check_arguments


@TRANSFORMS.register_module()
class TorchvisionTransforms(BaseTransform):
    """Augmentations of ``torchvision.transforms.v2``, on the RGB image in 8 bits.

    Args:
        transforms: configs: ``dict(type='RandomResizedCrop', size=224, interpolation='bicubic')``, ...

    Required and modified keys: ``img``, ``[H, W, 3]`` BGR, uint8, as ``LoadImageFromFile`` gives it. ``img_shape`` is
    set.

    Raises:
        ConfigError: an unknown transform or argument, or one that gives no 8-bit RGB image.
    """

    def __init__(self, transforms: Sequence[Mapping]) -> None:
        self.names = [str(cfg.get('type')) for cfg in transforms]
        self.compose = v2.Compose([_transform(cfg, i) for i, cfg in enumerate(transforms)])

    def transform(self, results: dict) -> dict:
        """Augment one image."""
        image = torch.from_numpy(np.ascontiguousarray(results['img'][..., ::-1].transpose(2, 0, 1)))
        image = self.compose(image)
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.shape[0] != 3:
            raise ConfigError(
                f'pipeline: TorchvisionTransforms ({", ".join(self.names)}) must give an RGB image of 8 bits; leave '
                'out what normalises or converts, which the data preprocessor does'
            )
        results['img'] = np.ascontiguousarray(image.numpy().transpose(1, 2, 0)[..., ::-1])
        results['img_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        return f'TorchvisionTransforms({self.compose})'


@TRANSFORMS.register_module()
class PackImage(BaseTransform):
    """The end of a pipeline: ``inputs``, the image as ``[3, H, W]`` BGR, uint8, and nothing else."""

    def transform(self, results: dict) -> dict:
        """Pack one image."""
        return {'inputs': torch.from_numpy(np.ascontiguousarray(results['img'].transpose(2, 0, 1)))}


def _transform(cfg: Mapping, position: int) -> Any:
    key = f'pipeline: TorchvisionTransforms.transforms[{position}]'
    arguments = dict(cfg)
    name = str(arguments.pop('type', ''))
    found = getattr(v2, name, None)
    if not (isinstance(found, type) and issubclass(found, v2.Transform)):
        names = [n for n, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, v2.Transform)]
        raise ConfigError(f'{key}: torchvision.transforms.v2 has no {name!r}; {closest(name, names)}')
    check_arguments(found, arguments, key)
    if isinstance(arguments.get('interpolation'), str):
        known = [mode.value for mode in InterpolationMode]
        if arguments['interpolation'] not in known:
            raise ConfigError(
                f'{key}.interpolation: unknown {arguments["interpolation"]!r}; '
                f'{closest(arguments["interpolation"], known)}'
            )
        arguments['interpolation'] = InterpolationMode(arguments['interpolation'])
    for name, value in arguments.items():  # MMEngine's configs have lists of their own kind
        if isinstance(value, list):
            arguments[name] = list(value)
    return found(**arguments)
