"""What the doctor needs to know about MMSegmentation and MMDetection."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_dense import checkpoint as checkpoints
from kd_dense.analysis.doctor.toolbox import ADAPTS, Classes, Data, LoadedTeacher, Metric, Preprocessing, Toolbox
from kd_dense.distillation import Distillers
from kd_dense.engine.data_checks import check_loader, named_if_empty
from kd_dense.engine.run import _metric, _toolbox, check_data, is_adaptation, is_distillation
from kd_dense.engine.score import score, use_complete_metrics
from kd_dense.errors import ConfigError, closest
from kd_dense.models.build import build_model, fetch, load_teacher, read_checkpoint
from kd_dense.models.describe import image_normalization
from kd_dense.models.distillation import MODEL_KEYS, Distillation, check_teacher
from kd_dense.teacher import freeze


class MMToolbox(Toolbox):
    """A distillation config of MMSegmentation or MMDetection.

    Args:
        cfg: the config; left as it is.

    Raises:
        ConfigError: it is no distillation config.
    """

    needs_operators = True

    def __init__(self, cfg: Config) -> None:
        if is_adaptation(cfg):
            raise ConfigError(f'model: {ADAPTS}')
        if not is_distillation(cfg):
            raise ConfigError(
                f'model: {cfg.filename or "the config"} has no model of type kd_dense.Distillation; the doctor looks '
                'at distillation configs'
            )
        self.cfg = copy.deepcopy(cfg)
        use_complete_metrics(self.cfg)
        self.config = str(cfg.filename or '')
        self.name = _toolbox(cfg)
        self.packages = ('mmengine', 'mmcv', *(p for p in ('mmseg', 'mmdet') if p == self.name))
        self.device = torch.device(get_device())
        self.seed = (cfg.get('randomness') or {}).get('seed') or 0
        self._reader: Iterator | None = None
        init_default_scope(self.name or 'mmengine')

    # -- building ------------------------------------------------------------------------------------------------------

    def check_config(self) -> None:
        """Unknown keys of ``model`` and ``teacher``."""
        for key in self.cfg.model:
            if key not in (*MODEL_KEYS, 'type', '_scope_', 'data_preprocessor'):
                raise ConfigError(f'model: Distillation has no option {key!r}; {closest(key, MODEL_KEYS)}')
        for key in ('student', 'teacher', 'distillers'):
            if key not in self.cfg.model:
                raise ConfigError(f'model.{key}: is missing')
        check_teacher(self.cfg.model.teacher)

    def check_distillers(self) -> list[str]:
        """Types, options and loss weights."""
        return list(Distillers(self.cfg.model.distillers).methods)

    def load_teacher(self) -> LoadedTeacher:
        """The teacher, strictly loaded."""
        options = check_teacher(self.cfg.model.teacher)
        allow, trusted = options.get('allow', ()), bool(options.get('trusted', False))
        allow = (allow,) if isinstance(allow, str) else tuple(allow)
        source = options.get('checkpoint')
        model, self.teacher_meta, report = load_teacher(options['config'], source, allow, trusted)
        self.teacher = freeze(model).to(self.device)
        return LoadedTeacher(self.teacher, report, source and str(source), allow, trusted)

    def open_data(self) -> Data:
        """Training and validation loader, in this process."""
        for part in ('train_dataloader', 'val_dataloader'):
            if self.cfg.get(part) is None:
                raise ConfigError(f'{part}: the config has none; the doctor needs training and validation images')
        check_data(self.cfg)
        self.train_loader, self.val_loader = (self._loader(part) for part in ('train_dataloader', 'val_dataloader'))
        batch_size = self.cfg.train_dataloader.get('batch_size') or self.train_loader.batch_sampler.batch_size
        return Data(len(self.train_loader.dataset), len(self.val_loader.dataset), batch_size)

    def _loader(self, part: str) -> DataLoader:
        with named_if_empty(self.cfg[part], part):
            loader = Runner.build_dataloader(_in_this_process(self.cfg[part]), seed=self.seed)
        return check_loader(loader, part)

    def build_student(self) -> nn.Module:
        """The student, initialised from the seed of the config and from ``load_from``, as the runner does it."""
        set_random_seed(self.seed)
        source, preprocessor = self.cfg.model.student, self.cfg.model.get('data_preprocessor')
        preprocessor = self.cfg.get('data_preprocessor') if preprocessor is None else preprocessor
        if isinstance(source, Mapping):
            source = {'_scope_': self.name, **source}
            if preprocessor is not None:
                source = {'data_preprocessor': preprocessor, **source}
        student = build_model(source, 'student')
        if hasattr(student, 'init_weights'):
            student.init_weights()
        if self.cfg.get('load_from'):
            state = checkpoints.state_dict_of(read_checkpoint(fetch(self.cfg.load_from), 'load_from'))
            student.load_state_dict(state, strict=False)
        self.student = student.to(self.device)
        return self.student

    # -- looking -------------------------------------------------------------------------------------------------------

    def score(self, side: str, count: int | None) -> dict[str, float]:
        """By ``val_step`` and the evaluator of the config."""
        model = self.teacher if side == 'teacher' else self.student
        loader = self.val_loader
        evaluator = Evaluator(copy.deepcopy(self.cfg.val_evaluator))
        if count is not None:
            indices = np.linspace(0, len(loader.dataset) - 1, count).astype(int).tolist()
            settings = _in_this_process(self.cfg.val_dataloader)
            settings.pop('batch_sampler', None)
            loader = Runner.build_dataloader(dict(settings, dataset=loader.dataset, sampler=indices))
            _restrict_to(evaluator, loader.dataset, indices)
        modes = {m: m.training for m in model.modules()}
        try:
            return score(model, loader, evaluator)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def metric(self) -> Metric | None:
        """What a comparison of runs counts too."""
        found = _metric(self.cfg)
        return found and Metric(found[0], found[0].rpartition('/')[2], found[1])

    def classes(self) -> Classes:
        """Of the training set, and of the teacher's file."""
        student = getattr(self.train_loader.dataset, 'metainfo', {}).get('classes')
        teacher = (self.teacher_meta.get('dataset_meta') or {}).get('classes')
        return Classes(*(list(x) if x is not None else None for x in (student, teacher)), self._option('classes'))

    def preprocessing(self) -> Preprocessing:
        """Of the data preprocessors."""
        sides = (image_normalization(model) for model in (self.student, self.teacher))
        return Preprocessing(*sides, self._option('scale') or 1.0)

    def _option(self, key: str) -> Any:
        value = self.cfg.model.teacher.get(key) if isinstance(self.cfg.model.teacher, Mapping) else None
        return value.to_dict() if hasattr(value, 'to_dict') else value

    # -- training steps ------------------------------------------------------------------------------------------------

    def join(self) -> Distillers:
        """:class:`~kd_dense.Distillation` around the models that were built before."""
        options = dict(check_teacher(self.cfg.model.teacher), config=self.teacher, checkpoint=None, cache=None)
        arguments = {k: self.cfg.model[k] for k in ('probe_size', 'seed') if k in self.cfg.model}
        self.model = Distillation(self.student, options, self.cfg.model.distillers, **arguments).to(self.device)
        self.model.progress = 0.0
        self.model.train()
        return self.model.distillers

    def batches(self, count: int) -> Iterator[dict]:
        """From the training loader, augmented."""
        for _ in range(count):
            if self._reader is None:
                set_random_seed(self.seed)
                self._reader = iter(self.train_loader)
            batch = next(self._reader, None)
            if batch is None:  # an epoch is over; samplers of iteration-based runs do not end, nor can they begin anew
                self._reader = iter(self.train_loader)
                batch = next(self._reader)
            yield self.model.data_preprocessor(batch, True)

    def step(self, batch: dict) -> Tensor:
        """The student's own losses in a step with distillation."""
        losses = self.model._run_forward(batch, mode='loss')
        return self.model.parse_losses({k: v for k, v in losses.items() if not k.startswith('kd.')})[0]

    def student_step(self, batch: dict) -> Tensor:
        """Without taps, teacher or distillers."""
        return self.model.parse_losses(self.student(**batch, mode='loss'))[0]

    def teacher_step(self, batch: dict) -> None:
        """As :meth:`Distillation.forward` runs it."""
        model, inputs, samples = self.model, batch['inputs'], batch['data_samples']
        taps = model.distillers.taps('teacher', model.distillers.active(model.progress))
        sizes = model.context(inputs, samples).image_sizes
        model.teacher(taps, inputs, lambda images: model._run_teacher(images, samples, taps), sizes)

    def precision(self) -> AbstractContextManager:
        """Mixed precision where the config asks for it."""
        wrapper = str((self.cfg.get('optim_wrapper') or {}).get('type', ''))
        return torch.autocast(self.device.type) if wrapper.endswith('AmpOptimWrapper') else nullcontext()


def _in_this_process(loader: Mapping) -> dict:
    """The config of a data loader without worker processes."""
    settings = copy.deepcopy(dict(loader))
    for key in ('persistent_workers', 'prefetch_factor'):
        settings.pop(key, None)
    return dict(settings, num_workers=0)


def _restrict_to(evaluator: Evaluator, dataset: Any, indices: Iterable[int]) -> None:
    """COCO's evaluation counts objects of images that it was shown no prediction of, unless it is told the images."""
    for metric in evaluator.metrics:
        if hasattr(metric, 'img_ids') and hasattr(dataset, 'get_data_info'):
            metric.img_ids = [dataset.get_data_info(i)['img_id'] for i in indices]
