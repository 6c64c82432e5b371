"""Ultralytics trainers that distil."""

from __future__ import annotations

import random
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.data.utils import check_det_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, RANK
from ultralytics.utils.torch_utils import ModelEMA, strip_optimizer, torch_distributed_zero_first

from kd_dense.checkpoint import save
from kd_dense.errors import ConfigError
from kd_dense.yolo.config import YoloConfig, from_argument
from kd_dense.yolo.model import COUNTS, DistillationModel, count_objects
from kd_dense.yolo.teacher import check_class_taps, load_teacher

#: Key of our state in a checkpoint of Ultralytics. Everything below it is tensors, numbers and containers.
STATE = 'kd_dense'


class Distilling:
    """What is common to the trainers of this module; mixed into a trainer of Ultralytics.

    The training argument ``distill_model`` names a config of kd_dense, of which ``teacher`` and ``distillers`` are read
    (student, data and training arguments are those of the call). Because it is one of Ultralytics' own arguments, it
    survives the relaunch for several GPUs, and a resume.

    Every checkpoint holds the plain student, so that an environment without kd_dense loads it, and beside it, under the
    key ``kd_dense``, what a resumed run needs.
    """

    task: str
    config: YoloConfig
    distillation: DistillationModel  # the model that is trained, without the wrapper for several GPUs

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict | None = None
    ) -> None:
        overrides = dict(overrides or {})
        if overrides.get('task', self.task) != self.task:
            raise ConfigError(
                f'{type(self).__name__} is for the task {self.task!r}, not {overrides["task"]!r}; kd_dense has '
                'DistillationTrainer (detect) and SegmentationDistillationTrainer (segment)'
            )
        argument = overrides.get('distill_model')
        if argument:
            # Absolute, because the config is read again by the processes of a run on several GPUs, and on resume.
            overrides['distill_model'] = str(Path(argument).expanduser().resolve())
        if not overrides.get('resume'):
            # Before Ultralytics creates folders; on resume the argument may come from the checkpoint.
            gain = overrides.get('dis', DEFAULT_CFG_DICT['dis'])
            from_argument(overrides.get('distill_model'), gain).build_distillers()
        super().__init__(cfg, overrides, _callbacks)
        self.config = from_argument(self.args.distill_model, self.args.dis)
        if self.args.quantize == 8:
            raise ConfigError('train.quantize: 8-bit training does not go together with distillation; distil first')
        self._batch = 0

    # -- building ------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict:
        """Ultralytics' data set, or one sentence about what is missing; nothing is downloaded."""
        require_dataset(self.args.data, self.args.split)
        return super().get_dataset()

    def set_model_attributes(self) -> None:
        """Names and arguments for the student, which then gets its teacher and its distillers.

        The trainer calls this before it freezes, compiles, wraps or optimises anything, so connectors take part in all.
        """
        super().set_model_attributes()
        student = self.model
        if not isinstance(student.model[-1], Detect):
            raise ConfigError(
                f'student: its head is {type(student.model[-1]).__name__}; kd_dense trains YOLO detection and '
                'segmentation models (the v8, 11 and 26 families, for example)'
            )
        distillers = self.config.build_distillers()
        check_class_taps(distillers, self.config.teacher)
        teacher = load_teacher(self.config.teacher, student)
        self.distillation = DistillationModel(student, teacher, distillers)
        self.model = self.distillation
        if RANK in (-1, 0):
            for row in distillers.table:
                LOGGER.info(
                    f'{row.distiller}.{row.role}: student {row.student} | teacher {row.teacher} | '
                    f'connector {row.connector_parameters:,} parameters | loss weight {row.loss_weight}'
                )

    # -- training ------------------------------------------------------------------------------------------------------

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of ``event``; before a batch, tell the model how far the training is."""
        if event == 'on_train_epoch_start':
            self._batch = 0
        elif event == 'on_train_batch_start':
            batches = len(self.train_loader)
            model = self.distillation
            model.epoch = self.epoch
            model.iteration = self.epoch * batches + self._batch
            model.progress = min(model.iteration / (self.epochs * batches), 1.0)
            self._batch += 1
        super().run_callbacks(event)

    def preprocess_batch(self, batch: dict) -> dict:
        """Ultralytics' preprocessing; counts the objects while they are still in the host's memory."""
        counts = count_objects(batch)
        batch = super().preprocess_batch(batch)
        batch[COUNTS] = counts
        return batch

    def optimizer_step(self) -> None:
        """One step, the first of which proves that every connector learns."""
        super().optimizer_step()
        self.distillation.distillers.verify_gradients()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_model(self) -> bool:
        """Write ``last.pt``, and where due ``best.pt`` and ``epochN.pt``: the plain student, and our state."""
        student, average = self.distillation.student_model, self.ema.ema.student_model
        _repair(average, student)
        checkpoint = {
            'epoch': self.epoch,
            'best_fitness': self.best_fitness,
            'stopper': {'best_fitness': self.stopper.best_fitness, 'best_epoch': self.stopper.best_epoch},
            'model': None,  # as Ultralytics writes it: readers take the moving average
            'ema': _plain(average),
            'updates': self.ema.updates,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'train_args': vars(self.args),
            'train_metrics': {**self.metrics, 'fitness': self.fitness},
            'train_results': self.read_results_csv(),
            'date': datetime.now().astimezone().isoformat(),
            'version': ultralytics_version,
            'license': 'AGPL-3.0 (https://ultralytics.com/license)',
            'docs': 'https://docs.ultralytics.com',
            STATE: {
                'distillers': self.distillation.distillers.state_dict(),
                'student': student.state_dict(),
                'random': self._random_state(),
            },
        }
        paths = [self.last]
        if self.best_fitness == self.fitness:
            paths.append(self.best)
        if self.save_period > 0 and self.epoch % self.save_period == 0:
            paths.append(self.wdir / f'epoch{self.epoch}.pt')
        for path in paths:
            save(checkpoint, path)
        return True

    def _load_checkpoint_state(self, ckpt: dict) -> None:
        """Restore optimizer, scaler, moving average and connectors."""
        state = ckpt.get(STATE)
        if not state or 'distillers' not in state:
            raise ConfigError(
                f'{self.last}: holds no unfinished distillation (no connectors) and can not be resumed; start a new run'
            )
        joined = self.distillation
        try:
            joined.distillers.load_state_dict(state['distillers'])
        except RuntimeError as error:
            raise ConfigError(
                f'{self.args.distill_model}: its distillers are not those of the run that is resumed ({error}); resume '
                'with the config that it was started with'
            ) from None
        super()._load_checkpoint_state({**ckpt, 'ema': None})  # its moving average would be the joined model
        self.ema = ModelEMA(joined)
        self.ema.ema.student_model.load_state_dict(ckpt['ema'].float().state_dict())
        self.ema.updates = ckpt['updates']

    def resume_training(self, ckpt: dict | None) -> None:
        """Go on where the checkpoint stopped.

        Ultralytics goes on from the moving average; here the trained weights themselves and the random states are
        restored too, so that a run which is interrupted between two epochs ends like one that is not.
        """
        try:
            super().resume_training(ckpt)
        except AssertionError:
            raise ConfigError(f'{self.args.model}: this run is finished, there is nothing to resume') from None
        if ckpt is None or not self.resume:
            return
        state = ckpt[STATE]
        self.distillation.student_model.load_state_dict(state['student'])
        self._restore_random_state(state['random'])

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Ultralytics' recovery from a loss that is not finite; it is to see the student that our checkpoints hold."""
        wrapped, self.model = self.model, self.distillation.student_model
        try:
            return super()._handle_nan_recovery(epoch)
        finally:
            self.model = wrapped

    def _random_state(self) -> dict:
        """States of the random generators, and what mosaic draws from where the images are read in this process."""
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        state = {
            'python': list(random.getstate()[1]),
            'python_gauss': random.getstate()[2],
            'numpy': [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            'torch': torch.get_rng_state(),
        }
        if self.device.type == 'cuda':
            state['cuda'] = torch.cuda.get_rng_state(self.device)
        if self.train_loader.num_workers == 0:
            state['recent_images'] = list(getattr(self.train_loader.dataset, 'buffer', []))
        return state

    def _restore_random_state(self, state: dict) -> None:
        if self.train_loader.num_workers == 0:
            for index in state.get('recent_images', []):
                self.train_loader.dataset.load_image(index)
            self._replay_order()
        random.setstate((3, tuple(state['python']), state['python_gauss']))
        kind, keys, position, has_gauss, gauss = state['numpy']
        np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(state['torch'].cpu())
        if 'cuda' in state and self.device.type == 'cuda':
            torch.cuda.set_rng_state(state['cuda'].cpu(), self.device)

    def _replay_order(self) -> None:
        """Draw the order of the images of the epochs that are done, so that the next one is as it would have been.

        Only indices are drawn. Worker processes read ahead by an amount that is not known afterwards, so with them a
        resumed run sees its images in another order.
        """
        loader = self.train_loader
        # In the epoch in which mosaic is closed, the trainer begins a new iterator.
        closing = max(self.epochs - self.args.close_mosaic, 0) if self.args.close_mosaic else self.epochs
        runs = [closing, self.start_epoch - closing] if 0 < closing < self.start_epoch else [self.start_epoch]
        for epochs in runs:
            loader.iterator = loader._get_iterator()
            for _ in range(epochs * len(loader)):
                next(loader.iterator._sampler_iter)
        if closing < self.start_epoch:
            # The trainer will close mosaic again, and begin a new iterator once more, which this run has behind it.
            loader.reset = lambda: loader.__dict__.pop('reset')

    def final_eval(self) -> None:
        """Reduce the checkpoints to the student, and evaluate the best one."""
        with torch_distributed_zero_first(LOCAL_RANK):
            if RANK in (-1, 0):
                results = strip(self.last).get('train_results') if self.last.exists() else None
                if self.best.exists():
                    strip(self.best, {'train_results': results})
        if not self.best.exists():
            return
        LOGGER.info(f'\nValidating {self.best}...')
        self.validator.args.plots = self.args.plots
        self.validator.args.compile = False
        self.metrics = self.validator(model=self.best)
        self.metrics.pop('fitness', None)
        # Loggers show the numbers of the best weights as one more epoch.
        self.epoch += 1
        self.run_callbacks('on_fit_epoch_end')
        self.epoch -= 1


class DistillationTrainer(Distilling, DetectionTrainer):
    """Ultralytics' detection trainer, with a teacher.

    ``YOLO('yolo11n.yaml').train(trainer=kd_dense.yolo.DistillationTrainer, distill_model='config.py', data=..., ...)``
    """

    task = 'detect'


class SegmentationDistillationTrainer(Distilling, SegmentationTrainer):
    """Ultralytics' instance segmentation trainer, with a teacher; used like :class:`DistillationTrainer`."""

    task = 'segment'


def require_dataset(data: str, split: str = 'val') -> dict:
    """The data set that the YAML ``data`` describes.

    Raises:
        ConfigError: no such YAML, or images that are not there. They are not downloaded.
    """
    if not data:
        raise ConfigError('data: give the path of a data YAML')
    try:
        return check_det_dataset(data, autodownload=False, split=split)
    except FileNotFoundError as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f'data: {reason}; put the images there, or give another data YAML') from None


def strip(path: Path, updates: dict | None = None) -> dict:
    """Reduce a checkpoint to its student in half precision, as Ultralytics does, and drop our state; atomically."""
    temporary = path.with_name(f'.{path.name}.stripped')
    try:
        # A key that is None reads like one that was never there.
        checkpoint = strip_optimizer(path, s=str(temporary), updates={STATE: None, **(updates or {})})
        if checkpoint:  # Ultralytics has logged why, where there is none
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return checkpoint


def _plain(model: nn.Module) -> nn.Module:
    """A copy for a checkpoint: nothing of a training run on it, convolutions stored as every version reads them."""
    model = deepcopy(model).to(memory_format=torch.contiguous_format)
    model.criterion = None
    return model


@torch.no_grad()
def _repair(average: nn.Module, model: nn.Module) -> None:
    """Replace tensors of the moving average that are not finite, from which it would never recover, by the model's."""
    current = model.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            value.copy_(torch.nan_to_num(current[name]))
