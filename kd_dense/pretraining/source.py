"""Where the records of a pre-training come from: the views of an image folder, and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from torch import Tensor

from kd_dense.cache import fingerprint
from kd_dense.cache.live import LiveOutputs, check_hooks
from kd_dense.cache.source import Source
from kd_dense.cache.views import ViewBank
from kd_dense.engine.run import check_data
from kd_dense.errors import ConfigError
from kd_dense.pretraining.classifier import Classifier, check_options, identity_of

#: The one tap.
LOGITS = 'logits'


class ClassifierSource(Source):
    """A config whose model is a :class:`~kd_dense.BackbonePretraining`."""

    def __init__(self, cfg: Config, views: int, seed: int) -> None:
        check_hooks(cfg)
        check_data(cfg, ('train_dataloader',))
        check_options(cfg.model.get('teacher'))
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        self.cfg = cfg
        self.bank = ViewBank(fingerprint.plain_dataset(cfg), views, seed)
        loader = cfg.train_dataloader
        self.batch_size, self.workers = loader.get('batch_size') or 1, loader.get('num_workers', 0)

    def fingerprint(self) -> dict[str, Any]:
        """Of what the config says, and of the images."""
        return {**fingerprint_of(self.cfg), 'images': self.bank.images()}

    def build(self) -> tuple[None, LiveOutputs, None]:
        """No distillers, the classifier, and no class names."""
        return None, ClassifierOutputs(Classifier(**self.cfg.model.teacher).to(get_device())), None

    def close(self) -> None:
        """There is nothing to close."""


class ClassifierOutputs(LiveOutputs):
    """Logits of a classifier.

    Args:
        classifier: that gives them.

    Raises:
        ConfigError: images that are not packed, or of several sizes.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__([LOGITS])
        self.classifier = classifier
        self._size: tuple[int, ...] | None = None

    def images(self, samples: Sequence[dict]) -> Tensor:
        """``[B, 3, H, W]``, as the pipeline gave them."""
        for sample in samples:
            image = sample.get('inputs')
            if not isinstance(image, Tensor) or 'data_samples' in sample:
                raise ConfigError("train_dataloader.dataset.pipeline: must end with dict(type='kd_dense.PackImage')")
            self._size = self._size or tuple(image.shape[1:])
            if tuple(image.shape[1:]) != self._size:
                raise ConfigError(
                    f'train_dataloader.dataset.pipeline: gives images of {_by(self._size)} and {_by(image.shape[1:])} '
                    'pixels; crop or resize all of them to one size'
                )
        return torch.stack([sample['inputs'] for sample in samples])

    def prepared(self, sample: dict) -> dict:
        """As the classifier wants it."""
        return {'inputs': self.classifier.prepared(self.images([sample]))}

    def run(self, group: Sequence[dict]) -> dict[str, list[Tensor]]:
        """``[B, C]``."""
        return {LOGITS: [self.classifier(torch.cat([data['inputs'] for data in group]))]}


def _by(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))


def fingerprint_of(cfg: Config) -> dict[str, Any]:
    """See :mod:`kd_dense.cache.fingerprint`. The student is no part of it: one cache serves any number of them."""
    options = check_options(cfg.model.get('teacher'))
    return {
        'teacher': identity_of(options),
        'checkpoint': fingerprint.file_hash(options['checkpoint']),
        **fingerprint.of_dataset(cfg),
        'versions': fingerprint.versions(*fingerprint.PACKAGES, 'mmengine', 'mmcv', 'torchvision'),
    }
