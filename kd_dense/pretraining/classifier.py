"""The teacher of a pre-training: any image classifier, frozen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import ImgDataPreprocessor
from torch import Tensor, nn

from kd_dense import checkpoint as checkpoints
from kd_dense.cache.fingerprint import hash_of
from kd_dense.errors import ConfigError, closest
from kd_dense.models.build import fetch, read_checkpoint
from kd_dense.teacher import freeze, load_weights

#: Classes that a cache can number: the largest int16, and 0.
MOST_CLASSES = 1 << 15
IMAGENET = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
DEFAULTS = dict(
    config=None,
    arguments={},
    checkpoint=None,
    allow=(),
    trusted=False,
    mean=IMAGENET['mean'],
    std=IMAGENET['std'],
    order='rgb',
    scale=1.0,
    cache=None,
)


class Classifier:
    """``[B, 3, H, W]`` BGR images in 8 bits -> logits ``[B, C]``, fp32.

    Args:
        config: ``'module:function'`` that returns the model: ``'torchvision.models:resnet50'``,
            ``'timm:create_model'``, ``'mmpretrain:get_model'``, or one of yours. ``None``: the checkpoint is a
            TorchScript program.
        arguments: of the function.
        checkpoint: file or URL of the trained weights, loaded strictly and without running code.
        allow: prefixes of tensors that may be missing from the file, or left over in it.
        trusted: let the checkpoint call functions, see :func:`kd_dense.checkpoint.load`.
        mean, std: of the images, on a scale of 0..255; those of torchvision's ImageNet models.
        order: of the channels, ``'rgb'`` or ``'bgr'``.
        scale: the classifier sees the images that many times as large.
        cache: not looked at here.

    Raises:
        ConfigError: a model that can not be built, a file that is missing or does not fit, or an output that is not
            ``[B, C]``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = check_options(options)
        o = self.options
        self.model = _program(o) if o['config'] is None else freeze(_built(o))
        self.preprocessor = ImgDataPreprocessor(mean=o['mean'], std=o['std'], bgr_to_rgb=o['order'] == 'rgb')
        self.num_classes: int | None = None

    def to(self, device: torch.device | str) -> Classifier:
        """Move it."""
        self.model.to(device)
        self.preprocessor.to(device)
        return self

    def prepared(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]``, BGR, 8 bits -> ``[B, 3, H', W']`` as the model wants it, on its device."""
        inputs = self.preprocessor({'inputs': images})['inputs']
        if self.options['scale'] == 1:
            return inputs
        return F.interpolate(inputs, scale_factor=self.options['scale'], mode='bilinear', align_corners=False)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, C]`` of what :meth:`prepared` returned."""
        logits = self.model(inputs)
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs) or logits.shape[1] < 2:
            raise ConfigError(
                f'teacher.config: {self.name} gives {found} for {len(inputs)} images and must give logits [B, C] of '
                'two or more classes; name a classifier, or a function that wraps yours'
            )
        if logits.shape[1] > MOST_CLASSES:
            raise ConfigError(
                f'teacher.config: {self.name} has {logits.shape[1]} classes and a cache can number {MOST_CLASSES}'
            )
        self.num_classes = logits.shape[1]
        return logits.float()

    @property
    def name(self) -> str:
        """For sentences."""
        return self.options['config'] or self.options['checkpoint']


def check_options(options: Mapping | None) -> dict[str, Any]:
    """The options of a :class:`Classifier`, with defaults.

    Raises:
        ConfigError: an unknown one, or no checkpoint.
    """
    if not isinstance(options, Mapping):
        raise ConfigError("model.teacher: needs dict(config='module:function', checkpoint='FILE', cache='FOLDER')")
    for name in options:
        if name not in DEFAULTS:
            raise ConfigError(f'model.teacher: has no option {name!r}; {closest(name, DEFAULTS)}')
    found = {**DEFAULTS, **options}
    if not found['checkpoint']:
        raise ConfigError(
            'teacher.checkpoint: none is given, and a teacher with random weights teaches nothing; give the '
            'file of its trained weights'
        )
    if found['order'] not in ('rgb', 'bgr'):
        raise ConfigError(f"teacher.order: must be 'rgb' or 'bgr', not {found['order']!r}")
    if not (isinstance(found['scale'], (int, float)) and found['scale'] > 0):
        raise ConfigError(f'teacher.scale: must be a number above 0, not {found["scale"]!r}')
    return found


def identity_of(options: Mapping) -> str:
    """A hash of everything but the checkpoint that its outputs depend on."""
    names = ('config', 'arguments', 'mean', 'std', 'order', 'scale', 'allow')
    return hash_of([options[name] for name in names])


def _built(options: Mapping) -> nn.Module:
    source = str(options['config'])
    module, _, function = source.partition(':')
    if not function or '::' in source:
        raise ConfigError(
            f"teacher.config: must be 'module:function', such as 'torchvision.models:resnet50', not {source!r}"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(
            f'teacher.config: {module} can not be imported ({error}); install it, or correct the name'
        ) from None
    except AttributeError:
        names = vars(importlib.import_module(module))
        raise ConfigError(f'teacher.config: {module} has no {function!r}; {closest(function, names)}') from None
    try:
        model = found(**options['arguments'])
    except Exception as error:  # whatever it raises: it is not ours
        raise ConfigError(f'teacher.config: {source} can not be built: {" ".join(str(error).split())}') from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f'teacher.config: {source} returns {type(model).__name__}, and must return a torch.nn.Module')
    state = checkpoints.state_dict_of(
        read_checkpoint(fetch(options['checkpoint']), 'teacher.checkpoint', options['trusted'])
    )
    print_log(load_weights(model, state, str(options['checkpoint']), options['allow']), 'current')
    return model


def _program(options: Mapping) -> nn.Module:
    path = fetch(options['checkpoint'])
    try:
        model = torch.jit.load(path, map_location='cpu').eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f'teacher.checkpoint: {path} can not be loaded as a TorchScript program '
            f'({(str(error).splitlines() or [""])[0]}); give teacher.config if it has weights alone'
        ) from None
    for parameter in model.parameters():  # a program has no requires_grad_
        parameter.requires_grad_(False)
    return model
