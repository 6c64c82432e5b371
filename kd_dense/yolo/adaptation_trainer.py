"""Ultralytics' detection trainer with mean-teacher adaptation, and the source alone as its baseline."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.cfg import DEFAULT_CFG
from ultralytics.data.build import build_dataloader
from ultralytics.data.utils import get_split_fraction
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from kd_dense.adaptation.collapse import CollapseWatch
from kd_dense.adaptation.transforms import image_files
from kd_dense.errors import ConfigError
from kd_dense.random_state import preserve_random_state
from kd_dense.yolo.adaptation_config import Adaptation
from kd_dense.yolo.adaptation_model import AdaptationModel
from kd_dense.yolo.config import YoloConfig, adaptation_from_argument
from kd_dense.yolo.model import COUNTS, count_objects
from kd_dense.yolo.paired_data import TARGET, PairedLoader, TranslatedDataset, split
from kd_dense.yolo.trainer import StudentInside, require_dataset
from kd_dense.yolo.validation import Untimed, no_time_limit

#: Between the seeds of the order of both domains; more than there are epochs, which are added to such a seed.
OTHER_ORDER = 1 << 20
#: Columns of results.csv about pseudo labels, as BoxStatistics calls them; precision only where it is known.
REPORTED = ('per_image', 'score', 'precision')


class TwoDomains:
    """Data of both domains; mixed into a detection trainer of Ultralytics.

    ``train`` of the data YAML is the source. Validation images are those of the target's data YAML, and where the
    target is a folder those of ``data``.
    """

    config: YoloConfig
    with_target = True

    @property
    def options(self) -> Adaptation:
        """What the config says."""
        return self.config.adaptation

    def get_dataset(self) -> dict:
        """Ultralytics' data set of the source, with the images of the target.

        Raises:
            ConfigError: no target, or one of other classes, or images that are not of three channels.
        """
        self.config = adaptation_from_argument(self.args.distill_model)  # on resume that of the checkpoint
        data = super().get_dataset()
        if data.get('channels', 3) != 3:
            raise ConfigError(f'data: its images have {data["channels"]} channels; adaptation needs colour images of 3')
        if self.options.target_yaml is None:
            folder = Path(self.options.target).expanduser()
            image_files(folder, 'adaptation.target')
            return {**data, TARGET: str(folder)}
        target = require_dataset(self.options.target_yaml, self.args.split, 'adaptation.target')
        names, others = (list(one['names'].values()) for one in (data, target))
        if names != others and not self.args.single_cls:
            raise ConfigError(
                f'adaptation.target: has the classes {_some(others)} and the source {_some(names)}; give both data '
                'YAMLs the same names in the same order'
            )
        return {**data, self.args.split: target[self.args.split], TARGET: target['train']}

    def build_dataset(self, img_path: Any, mode: str = 'train', batch: int | None = None) -> Any:
        """Ultralytics' data sets; the one of the source with translations."""
        if mode != 'train':
            return super().build_dataset(img_path, mode, batch)
        return self._translated(img_path, batch, 'source')

    def _translated(self, img_path: Any, batch: int | None, domain: str) -> TranslatedDataset:
        """The images of a domain, with what the config says about their translation."""
        options, with_style = self.options, self.with_target
        folder = getattr(options, f'translated_{domain}') if with_style else None
        return TranslatedDataset(
            img_path,
            translated=folder,
            style=options.style if with_style and folder is None else None,
            key=f'adaptation.translated_{domain}',
            labelled=domain == 'source',
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=True,
            hyp=self.args,
            rect=self.args.rect,
            cache=self.args.cache or None,
            single_cls=self.args.single_cls or False,
            stride=max(int(unwrap_model(self.model).stride.max()), 32),
            pad=0.0,
            prefix=colorstr(f'{domain}: '),
            task=self.args.task,
            classes=self.args.classes,
            data=self.data,
            fraction=get_split_fraction(self.args.fraction, 'train'),
        )

    def get_dataloader(self, dataset_path: Any, batch_size: int = 16, rank: int = 0, mode: str = 'train') -> Any:
        """Ultralytics' loaders; for training one of pairs of batches."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if mode != 'train':
            return loader
        with torch_distributed_zero_first(rank):
            target = self._translated(self.data[TARGET], batch_size, 'target')
        target.references, loader.dataset.references = loader.dataset.im_files, target.im_files
        other = build_dataloader(
            target,
            batch=batch_size,
            workers=self.args.workers,
            shuffle=not target.rect,
            rank=rank,
            drop_last=loader.drop_last,
            device=self.device,
        )
        # Ultralytics seeds all loaders alike, and domains of one size would be drawn in one order: where the images of
        # both show the same scenes, a source image would always come with its own counterpart.
        other.generator.manual_seed(other.generator.initial_seed() + OTHER_ORDER)
        if rank != -1 and hasattr(other.sampler, 'seed'):
            other.sampler.seed += OTHER_ORDER
        return PairedLoader(loader, other, self.with_target)


class AdaptationTrainer(TwoDomains, StudentInside, DetectionTrainer):
    """Ultralytics' detection trainer, for a student that adapts to a target domain without labels.

    ``distill_model`` is the path of a config of kd_dense with ``adaptation``. The student that is validated and saved
    is Ultralytics' own moving average of it, as in its trainer; the mean teacher is another one, faster, from which the
    student learns. ``results.csv`` has a column for each term of the loss; ``teacher/...``, the scores of the mean
    teacher, after each validation; and ``pseudo/...``, what became of the pseudo labels of the epoch.
    """

    task = 'detect'
    suspects = 'pseudo_weight, styled_weight and consistency_weight of adaptation'
    joined: AdaptationModel

    def read_config(self, argument: str | None, gain: float) -> YoloConfig:
        return adaptation_from_argument(argument)

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, overrides, _callbacks)
        if self.args.batch < 1:
            raise ConfigError('train.batch: give a number of images; an automatic one does not know of both domains')
        if getattr(self.args, 'augmentations', None):
            raise ConfigError(
                'train.augmentations: Albumentations can not treat an image and its translation alike; remove them'
            )
        self._resumed = False
        self._report: dict[str, float] = {}  # scores of this epoch that Ultralytics does not know of
        self._collapse = CollapseWatch()

    def join(self, student: nn.Module) -> AdaptationModel:
        return AdaptationModel(student, self.options)

    def loaders(self) -> list[Any]:
        return self.train_loader.loaders

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        self.joined.known = self.loaders()[1].dataset.has_labels
        if RANK in (-1, 0):
            known = 'for the precision of pseudo labels in the log' if self.joined.known else 'none'
            counts = ' and '.join(str(len(loader.dataset)) for loader in self.loaders())
            batches = f'{len(self.train_loader)} batches an epoch'
            LOGGER.info(f'source and target: {counts} images, {batches}; labels of the target: {known}')

    def get_validator(self) -> Any:
        """Ultralytics' validator; makes one more, for the one of student and teacher that is not saved."""
        validator = super().get_validator()
        self._second = super().get_validator()
        self._second.args.plots = False
        return validator

    # -- training ------------------------------------------------------------------------------------------------------

    def preprocess_batch(self, batch: dict) -> dict:
        """Ultralytics' preprocessing of both domains; with ``multi_scale`` one size for all."""
        target = batch.pop(TARGET)
        counts = count_objects(target)  # while they are still in the host's memory
        state = random.getstate()
        batch = super().preprocess_batch(batch)
        random.setstate(state)
        batch[TARGET] = {**split(super().preprocess_batch(target)), COUNTS: counts}
        return split(batch)

    def run_callbacks(self, event: str) -> None:
        """Let the teacher begin as the student does when training begins, whatever was loaded or sent since."""
        if event == 'on_train_start' and not self._resumed:
            self.joined.mean_teacher.reset(self.joined.student_model)
        super().run_callbacks(event)

    def after_step(self) -> None:
        """The teacher follows."""
        self.joined.mean_teacher.update(self.joined.student_model)

    def _close_dataloader_mosaic(self) -> None:
        super()._close_dataloader_mosaic()
        self.loaders()[1].dataset.close_mosaic(hyp=copy(self.args))

    # -- validation ----------------------------------------------------------------------------------------------------

    def validate(self) -> tuple:
        """Score what is saved, by which Ultralytics chooses the best epoch, and then the other one."""
        average, teacher = self.ema.ema, self.joined.mean_teacher.model
        saved, other = (average, teacher) if self.options.save == 'student' else (teacher, average)
        with self._in_place_of_the_average(saved):
            metrics, fitness = super().validate()
        if self.options.evaluate_teacher:
            LOGGER.info(f'{self._other}:')
            with self._in_place_of_the_average(other), no_time_limit(), preserve_random_state():
                found = self._second(self) or {}
            self._report.update({self._column(k): v for k, v in found.items() if k.startswith('metrics/')})
        return metrics, fitness

    @property
    def _other(self) -> str:
        """The one of both that is scored beside the one that is saved, in the words of the log."""
        return 'teacher' if self.options.save == 'student' else 'student'

    def _column(self, metric: str) -> str:
        return metric.replace('metrics', self._other).removesuffix('(B)')

    @contextmanager
    def _in_place_of_the_average(self, model: nn.Module) -> Iterator[None]:
        """Inside, Ultralytics validates ``model``."""
        average, self.ema.ema = self.ema.ema, model
        try:
            yield
        finally:
            self.ema.ema = average

    def save_metrics(self, metrics: dict) -> None:
        """Ultralytics' row of results.csv, with more columns; ``nan`` is what was not measured in this epoch."""
        columns = {}
        if self.options.evaluate_teacher:
            columns = {self._column(key): math.nan for key in self.validator.metrics.keys}
        report = self.joined.statistics.report(list(self.data['names'].values()))
        self.joined.statistics.reset()
        if report:
            LOGGER.info('pseudo labels: ' + ', '.join(f'{name} {value:.4g}' for name, value in report.items()))
        if sentence := self._collapse(report.get('per_image')):
            LOGGER.warning(sentence)
        for name in REPORTED:
            if name != 'precision' or self.joined.known:
                columns[f'pseudo/{name}'] = report.get(name, math.nan)
        columns.update(self._report)
        self._report = {}
        super().save_metrics({**metrics, **columns})

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def plain_to_save(self) -> nn.Module:
        """The student's moving average, or the mean teacher where the config says so."""
        return super().plain_to_save() if self.options.save == 'student' else self.joined.mean_teacher.model

    def _random_state(self) -> dict:
        state = super()._random_state()
        if self.train_loader.num_workers == 0:
            state['styles'] = [loader.dataset.kept() for loader in self.loaders()]
        return state

    def _restore_random_state(self, state: dict) -> None:
        for loader, kept in zip(self.loaders(), state.get('styles', []), strict=False):
            loader.dataset.recall(kept)
        super()._restore_random_state(state)

    def state_beside(self) -> dict[str, Any]:
        state = {'mean_teacher': self.joined.mean_teacher.state_dict()}
        if self.options.save == 'mean_teacher':
            state['average'] = super().plain_to_save().state_dict()
        return state

    def load_state_beside(self, state: dict[str, Any] | None) -> None:
        if not state or 'mean_teacher' not in state:
            raise ConfigError(
                f'{self.last}: holds no unfinished adaptation (no mean teacher) and can not be resumed; start a new run'
            )
        self.joined.mean_teacher.load_state_dict(state['mean_teacher'])
        self._resumed = True


class SourceTrainer(TwoDomains, Untimed, DetectionTrainer):
    """Ultralytics' detection trainer: the student alone, on the source; the baseline of an adaptation.

    Steps, batches, learning rates and validation images are those of :class:`AdaptationTrainer`.
    """

    with_target = False

    def _setup_train(self) -> None:
        """Ultralytics' set-up, which would distil wherever ``distill_model`` is set."""
        argument, self.args.distill_model = self.args.distill_model, None
        try:
            super()._setup_train()
        finally:
            self.args.distill_model = argument


def _some(names: list[str]) -> str:
    return ', '.join(map(str, names[:4])) + (', ...' if len(names) > 4 else '')
