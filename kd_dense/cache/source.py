"""Where the records of a cache come from: the views of a training set, and the teacher that looks at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from kd_dense.cache import fingerprint
from kd_dense.cache.live import DistillationOutputs, LiveOutputs, check_hooks
from kd_dense.cache.views import ViewBank
from kd_dense.distillation import Distillers
from kd_dense.engine.run import _toolbox, check_data, is_distillation
from kd_dense.errors import ConfigError
from kd_dense.models.distillation import MODEL_KEYS, Distillation, check_teacher


class Source(ABC):
    """One toolbox's part in writing a cache. What it says about a config is said before the teacher is built.

    Args:
        views, seed: of the bank.

    Raises:
        ConfigError: a config that is no distillation, or whose views can not be replayed.
    """

    bank: ViewBank
    #: Images at once and processes of the training, for who says nothing else.
    batch_size: int
    workers: int

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """See :mod:`kd_dense.cache.fingerprint`; ``images`` included."""

    @abstractmethod
    def build(self) -> tuple[Distillers, LiveOutputs, Iterable[str] | None]:
        """The distillers, set up; the live teacher; and its classes, where they are known.

        Raises:
            ConfigError: a teacher that does not fit, or taps that can not be kept.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove what was made along the way."""


class MMEngineSource(Source):
    """A config of MMSegmentation or MMDetection."""

    def __init__(self, cfg: Config, views: int, seed: int) -> None:
        if not is_distillation(cfg):
            raise ConfigError(
                f'model: {cfg.filename or "the config"} has no model of type kd_dense.Distillation, and so no trained '
                'teacher to keep the outputs of; give a distillation config'
            )
        check_hooks(cfg)
        check_data(cfg, ('train_dataloader',))
        self.cfg, self.scope = cfg, _toolbox(cfg)
        init_default_scope(self.scope or 'mmengine')
        self.bank = ViewBank(fingerprint.plain_dataset(cfg), views, seed)
        loader = cfg.train_dataloader
        self.batch_size, self.workers = loader.get('batch_size') or 1, loader.get('num_workers', 0)

    def fingerprint(self) -> dict[str, Any]:
        """Of what the config says, and of the images."""
        return {**fingerprint.fingerprint(self.cfg), 'images': self.bank.images()}

    def build(self) -> tuple[Distillers, LiveOutputs, Iterable[str] | None]:
        """The model of the config, with the live teacher."""
        cfg = self.cfg
        settings = {key: cfg.model[key] for key in MODEL_KEYS if key in cfg.model}
        preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
        if isinstance(settings['student'], dict):
            settings['student'] = {'_scope_': self.scope, **settings['student']}
        settings['teacher'] = dict(check_teacher(settings['teacher']), cache=None)
        model = Distillation(**settings, data_preprocessor=preprocessor).to(get_device())
        classes = (model.teacher_meta.get('dataset_meta') or {}).get('classes')
        return model.distillers, DistillationOutputs(model), classes

    def close(self) -> None:
        """There is nothing."""
