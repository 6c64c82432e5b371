"""What the live teacher gives for one training sample at a time, as in training."""

from __future__ import annotations

import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor

from kd_dense.context import Context
from kd_dense.description import ROI_TAPS
from kd_dense.errors import ConfigError
from kd_dense.models.distillation import Distillation

#: Hooks that change the pipeline in the middle of the training.
_SWITCHES = ('PipelineSwitchHook', 'YOLOXModeSwitchHook')


class LiveOutputs(ABC):
    """Runs a teacher on samples of its training set.

    Each image is put on a canvas as if it were the only one of its batch: which others it meets in training is not
    known. Where all are cropped to one size, that makes no difference.

    Args:
        names: of the teacher's taps.

    Raises:
        ConfigError: taps that can not be kept.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        for name in self.names:
            if name.split(':')[0] in ROI_TAPS:
                raise ConfigError(
                    f'distillers: the tap {name!r} of the teacher can not be cached: its RoI head has to look at the '
                    'regions of the student; train with the live teacher, without teacher.cache'
                )

    @abstractmethod
    def prepared(self, sample: dict) -> dict:
        """The sample as the model gets it, alone: ``inputs`` ``[1, C, H, W]``, and what else is needed to run it."""

    @abstractmethod
    def run(self, group: Sequence[dict]) -> dict[str, list[Tensor]]:
        """Tap name -> tensors of the batch of what :meth:`prepared` returned, on equal canvases."""

    def context(self, data: dict) -> Context:
        """What a distiller that compares class logits may know about what :meth:`prepared` returned."""
        return Context(tuple(data['inputs'].shape[2:]))

    def __call__(self, samples: Sequence[dict]) -> list[dict[str, list[Tensor]]]:
        """For each sample: tap name -> tensors without the batch dimension."""
        outputs = []
        alone = map(self.prepared, samples)
        for _, group in itertools.groupby(alone, key=lambda data: data['inputs'].shape):
            group = list(group)
            values = self.run(group)
            outputs += [{n: [x[i] for x in tensors] for n, tensors in values.items()} for i in range(len(group))]
        return outputs

    def check(self, sample: dict) -> None:
        """Does every tensor have one entry for each image, and does that depend on this image alone?

        Raises:
            ConfigError: the first tap of which that is not so.
        """
        data = self.prepared(sample)
        one, two = self.run([data]), self.run([data, data])
        for name in self.names:
            pairs = zip(one[name], two[name], strict=True)
            if any(b.shape != (2, *a.shape[1:]) or a.shape[0] != 1 or difference(a[0], b[1]) > 0.01 for a, b in pairs):
                raise ConfigError(
                    f'distillers: the tap {name!r} of the teacher can not be cached: its tensors do not begin with one '
                    'entry for each image; tap another place, or train without teacher.cache'
                )


class DistillationOutputs(LiveOutputs):
    """Of the teacher of a :class:`~kd_dense.Distillation`.

    Args:
        model: with its teacher at hand.

    Raises:
        ConfigError: outputs that can not be kept, or a data preprocessor that mixes images or draws.
    """

    def __init__(self, model: Distillation) -> None:
        super().__init__(model.distillers.tap_names('teacher'))
        self.model = model
        if getattr(model.data_preprocessor, 'batch_augments', None):
            raise ConfigError(
                'student.data_preprocessor.batch_augments: changes whole batches at random, which a cache can not '
                'replay; remove it, or train without teacher.cache'
            )

    def prepared(self, sample: dict) -> dict:
        """By the student's data preprocessor."""
        return self.model.data_preprocessor(pseudo_collate([sample]), True)

    def context(self, data: dict) -> Context:
        """As in a training step: labels and padding too."""
        return self.model.context(data['inputs'], data['data_samples'])

    def run(self, group: Sequence[dict]) -> dict[str, list[Tensor]]:
        """As the training step does."""
        model = self.model
        inputs = torch.cat([data['inputs'] for data in group])
        samples = [data['data_samples'][0] for data in group]
        taps = model.distillers.taps('teacher', model.distillers.methods)
        sizes = model.context(inputs, samples).image_sizes
        return model.teacher(taps, inputs, lambda images: model._run_teacher(images, samples, taps), sizes)


def difference(found: Tensor, expected: Tensor) -> float:
    """Euclidean distance of two tensors as a share of the length of the second."""
    if found.shape != expected.shape:
        return float('inf')
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def crc_of_image(image: Tensor) -> int:
    """CRC-32 of an image that a pipeline returned."""
    return zlib.crc32(np.ascontiguousarray(image.numpy()).view(np.uint8))


def check_hooks(cfg: Mapping) -> None:
    """A pipeline that changes while the student trains can not be replayed.

    Raises:
        ConfigError: a hook changes it.
    """
    for hook in cfg.get('custom_hooks') or []:
        name = str(hook.get('type', '')).rpartition('.')[2] if isinstance(hook, Mapping) else type(hook).__name__
        if name in _SWITCHES:
            raise ConfigError(
                f'custom_hooks: {name} changes the pipeline during the training, which a cache can not follow; remove '
                'it, or train without teacher.cache'
            )
