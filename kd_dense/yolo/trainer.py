"""Ultralytics trainers that distil, and what trainers with something beside the student have in common."""

from __future__ import annotations

import math
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

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

from kd_dense.analysis.doctor.weights import about_weights
from kd_dense.checkpoint import atomic_write, save
from kd_dense.engine.gradient_hook import pending_gradients, put_back
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.random_state import capture, restore
from kd_dense.yolo.config import YoloConfig, from_argument
from kd_dense.yolo.model import COUNTS, DistillationModel, count_objects
from kd_dense.yolo.student_inside import StudentInsideModel
from kd_dense.yolo.validation import Untimed, no_time_limit
from kd_dense.yolo.views import OnViews, verify, with_cached_teacher, with_live_teacher

#: Key of our state in a checkpoint of Ultralytics. Everything below it is tensors, numbers and containers.
STATE = 'kd_dense'


class StudentInside(Untimed):
    """Trains a student that is inside another model; mixed into a trainer of Ultralytics.

    The training argument ``distill_model`` names a config of kd_dense (student, data and training arguments are those
    of the call). Because it is one of Ultralytics' own arguments, it survives the relaunch for several GPUs, and a
    resume.

    Every checkpoint holds the plain student, so that an environment without kd_dense loads it, and beside it, under the
    key ``kd_dense``, what a resumed run needs.
    """

    task: str
    config: YoloConfig
    joined: StudentInsideModel  # the model that is trained, without the wrapper for several GPUs

    # What a subclass says about what is beside the student.

    def read_config(self, argument: str | None, gain: float) -> YoloConfig:
        """The config that ``distill_model`` names, checked; ``gain`` is Ultralytics' argument ``dis``."""
        raise NotImplementedError

    def join(self, student: nn.Module) -> StudentInsideModel:
        """The model to be trained, around ``student``."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    def state_beside(self) -> dict[str, Any]:
        """What a resumed run needs beside the student: tensors, numbers and containers."""
        raise NotImplementedError

    def load_state_beside(self, state: dict[str, Any] | None) -> None:
        """Restore :meth:`state_beside`.

        Raises:
            ConfigError: it is of another run, or there is none.
        """
        raise NotImplementedError

    def plain_to_save(self) -> nn.Module:
        """The model whose weights a checkpoint holds for everybody: the moving average of the student."""
        return self.ema.ema.student_model

    #: What to look at when the loss is not finite.
    suspects: str

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
            self.read_config(overrides.get('distill_model'), gain)
        super().__init__(cfg, overrides, _callbacks)
        self.config = self.read_config(self.args.distill_model, self.args.dis)
        if self.args.quantize == 8:
            raise ConfigError(
                'train.quantize: 8-bit training goes together with neither distillation nor adaptation; do that first'
            )
        self._batch = 0
        self._last_step = -1  # iteration of the last optimizer step
        self._gradients: dict[str, torch.Tensor] = {}  # of a resumed run, since that step
        self._catching_up = False

    # -- building ------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict:
        """Ultralytics' data set, or one sentence about what is missing; nothing is downloaded."""
        require_dataset(self.args.data, self.args.split)
        return super().get_dataset()

    def set_model_attributes(self) -> None:
        """Names and arguments for the student, which then goes into the model that is trained.

        The trainer calls this before it freezes, compiles, wraps or optimises anything, so what is beside the student
        takes part in all.
        """
        super().set_model_attributes()
        student = self.model
        if not isinstance(student.model[-1], Detect):
            raise ConfigError(
                f'student: its head is {type(student.model[-1]).__name__}; kd_dense trains YOLO detection and '
                'segmentation models (the v8, 11 and 26 families, for example)'
            )
        self.model = self.joined = self.join(student)
        self._compile = self.args.compile
        if self._compile:
            # Ultralytics compiles no model that distils: it would compile the teacher too, and step around our loss.
            self.joined.compile_student(self._compile)
            self.args.compile = False
            LOGGER.info('the student is compiled by torch.compile; the first iterations will be slow')

    # -- training ------------------------------------------------------------------------------------------------------

    def run_callbacks(self, event: str) -> None:
        """Run the callbacks of ``event``; before a batch, tell the model how far the training is.

        Raises:
            DistillationError: the loss is not finite, and there is nothing to which Ultralytics could return.
        """
        if event == 'on_train_epoch_start':
            self._batch = 0
            if self._gradients:  # not earlier: Ultralytics clears all gradients when training starts
                put_back(self.joined, self._gradients)
                self._gradients = {}
        elif event == 'on_train_batch_start':
            batches = len(self.train_loader)
            model = self.joined
            model.epoch = self.epoch
            model.iteration = self.epoch * batches + self._batch
            model.progress = min(model.iteration / (self.epochs * batches), 1.0)
            self._batch += 1
        super().run_callbacks(event)
        if event == 'on_train_batch_end' and self._batch % 10 == 0 and self.epoch == self.start_epoch:
            self._check_loss()

    # -- losses that are not finite ------------------------------------------------------------------------------------

    def _terms_not_finite(self) -> str:
        """The terms of the loss that were not finite in this epoch, as text."""
        means = {name: float(value) for name, value in (self.tloss or {}).items()}
        return ', '.join(f'{name} is {value}' for name, value in means.items() if not math.isfinite(value))

    def _check_loss(self) -> None:
        """Stop where the loss is not finite in the first epoch of a run, in which Ultralytics has no way back."""
        if not torch.isfinite(self.loss):
            raise self._not_finite(f'loss not finite in epoch {self.epoch + 1}: {self._terms_not_finite()}')

    def _not_finite(self, what: str) -> DistillationError:
        kept = f'the last good checkpoint is {self.last}, from which --resume goes on after the change'
        return DistillationError(
            f'{what}; look at {self.suspects} and at train.lr0; '
            f'{kept if self.epoch > 0 else "no checkpoint had been written before"}'
        )

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Ultralytics' recovery from a loss that is not finite, three times at most; then the run stops.

        Ultralytics is to see the student that our checkpoints hold.
        """
        terms = self._terms_not_finite()
        if epoch == self.start_epoch:
            self._check_loss()
        elif terms:
            LOGGER.warning(f'epoch {epoch + 1}: {terms}')
        wrapped, self.model = self.model, self.joined.student_model
        try:
            return super()._handle_nan_recovery(epoch)
        except RuntimeError as error:
            if 'NaN' not in str(error):
                raise
            raise self._not_finite(
                f'loss not finite: {terms or error}, in every attempt at epoch {epoch + 1}'
            ) from None
        finally:
            self.model = wrapped

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step; Ultralytics steps when that many have passed since the last one.

        Ultralytics does not know the last one of the run that is resumed. Until it has seen one itself, it is made to
        ask for a step after every batch, and :meth:`optimizer_step` takes the one that is due.
        """
        return 1 if self._catching_up and self._batch else self._accumulate

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._accumulate = value

    def _pending_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients that the next optimizer step will use; none when the last batch ended with a step."""
        return {} if self._last_step == self.joined.iteration else pending_gradients(self.joined)

    def optimizer_step(self) -> None:
        """One step, unless a resumed run is not there yet."""
        iteration = self.joined.iteration
        if self._catching_up and iteration - self._last_step < self._accumulate:
            return
        self._catching_up, self._last_step = False, iteration
        super().optimizer_step()
        self.after_step()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_model(self) -> bool:
        """Write ``last.pt``, and where due ``best.pt`` and ``epochN.pt``: the plain student, and our state.

        Raises:
            DistillationError: weights that are not finite; nothing was written.
        """
        student, average = self.joined.student_model, self.ema.ema.student_model
        wrong = [n for n, p in self.joined.named_parameters() if not torch.isfinite(p).all()]
        if wrong:
            raise self._not_finite(f'weights not finite after epoch {self.epoch + 1}: {", ".join(wrong[:3])}')
        _repair(average, student)
        checkpoint = {
            'epoch': self.epoch,
            'best_fitness': self.best_fitness,
            'stopper': {'best_fitness': self.stopper.best_fitness, 'best_epoch': self.stopper.best_epoch},
            'model': None,  # as Ultralytics writes it: readers take the moving average
            'ema': _plain(self.plain_to_save()),
            'updates': self.ema.updates,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'train_args': vars(self.args) | {'compile': self._compile},
            'train_metrics': {**self.metrics, 'fitness': self.fitness},
            'train_results': self.read_results_csv(),
            'date': datetime.now().astimezone().isoformat(),
            'version': ultralytics_version,
            'license': 'AGPL-3.0 (https://ultralytics.com/license)',
            'docs': 'https://docs.ultralytics.com',
            STATE: {
                **self.state_beside(),
                'student': student.state_dict(),
                'random': self._random_state(),
                'last_step': self._last_step,
                'gradients': self._pending_gradients(),
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
        """Restore optimizer, scaler, moving average and what is beside the student."""
        state = ckpt.get(STATE)
        self.load_state_beside(state)
        super()._load_checkpoint_state({**ckpt, 'ema': None})  # its moving average would be the joined model
        self.ema = ModelEMA(self.joined)
        self.ema.ema.student_model.load_state_dict(state.get('average') or ckpt['ema'].float().state_dict())
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
        self.joined.student_model.load_state_dict(state['student'])
        self._restore_random_state(state['random'])
        self._last_step, self._gradients = state['last_step'], state['gradients']
        self._catching_up = True
        if RANK in (-1, 0):
            _forget_rows_after(self.start_epoch, self.csv)

    def loaders(self) -> list[Any]:
        """Ultralytics' loaders that the batches of ``train_loader`` come from."""
        return [self.train_loader]

    def _random_state(self) -> dict:
        """Random states, and what mosaic draws from where the images are read in this process."""
        state = capture()
        if self.train_loader.num_workers == 0:
            state['recent_images'] = [list(getattr(loader.dataset, 'buffer', [])) for loader in self.loaders()]
        return state

    def _restore_random_state(self, state: dict) -> None:
        if RANK != -1:
            return  # these are the states of one process of several
        if self.train_loader.num_workers == 0:
            for loader, recent in zip(self.loaders(), state.get('recent_images', []), strict=False):
                for index in recent:
                    loader.dataset.load_image(index)
            self._replay_order()
        restore(state)

    def _replay_order(self) -> None:
        """Draw the order of the images of the epochs that are done, so that the next one is as it would have been.

        Only indices are drawn. Worker processes read ahead by an amount that is not known afterwards, so with them a
        resumed run sees its images in another order.
        """
        # In the epoch in which mosaic is closed, the trainer begins a new iterator.
        closing = max(self.epochs - self.args.close_mosaic, 0) if self.args.close_mosaic else self.epochs
        runs = [closing, self.start_epoch - closing] if 0 < closing < self.start_epoch else [self.start_epoch]
        for loader in self.loaders():
            for epochs in runs:
                loader.iterator = loader._get_iterator()
                for _ in range(epochs * len(self.train_loader)):
                    next(loader.iterator._sampler_iter)
        if closing < self.start_epoch:
            # The trainer will close mosaic again, and begin a new iterator once more, which this run has behind it.
            loader = self.train_loader
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
        with no_time_limit():
            self.metrics = self.validator(model=self.best)
        self.metrics.pop('fitness', None)
        # Loggers show the numbers of the best weights as one more epoch.
        self.epoch += 1
        self.run_callbacks('on_fit_epoch_end')
        self.epoch -= 1


class Distilling(StudentInside):
    """What is common to the trainers that distil: ``teacher`` and ``distillers`` of the config."""

    suspects = 'the loss_weight of the distillers that are named, at the teacher'

    @property
    def distillation(self) -> DistillationModel:
        """The model that is trained, without the wrapper for several GPUs."""
        return self.joined

    def read_config(self, argument: str | None, gain: float) -> YoloConfig:
        config = from_argument(argument, gain)
        config.build_distillers()
        return config

    def join(self, student: nn.Module) -> DistillationModel:
        self.teacher_cache = self.config.teacher['cache']
        return (with_cached_teacher if self.teacher_cache else with_live_teacher)(self.config, student)

    def set_model_attributes(self) -> None:
        """The student gets its teacher and its distillers, of which the log tells."""
        super().set_model_attributes()
        distillers = self.distillation.distillers
        if RANK in (-1, 0):
            nothing, sentences = about_weights(distillers)
            for sentence in filter(None, [nothing, *sentences]):
                LOGGER.warning(sentence)
            if self.distillation.remap is not None:
                LOGGER.info(f'teacher sees {self.distillation.remap}')
            for row in distillers.table:
                LOGGER.info(
                    f'{row.distiller}.{row.role}: student {row.student} | teacher {row.teacher} | '
                    f'connector {row.connector_parameters:,} parameters | loss weight {row.loss_weight}'
                )

    def _build_train_pipeline(self) -> None:
        """Ultralytics' loaders; a cache of the teacher's outputs is compared with the teacher."""
        super()._build_train_pipeline()
        if self.teacher_cache:
            verify(self)

    def preprocess_batch(self, batch: dict) -> dict:
        """Ultralytics' preprocessing; counts the objects while they are still in the host's memory."""
        counts = count_objects(batch)
        batch = super().preprocess_batch(batch)
        batch[COUNTS] = counts
        return batch

    def after_step(self) -> None:
        """The first step proves that every connector learns."""
        self.distillation.distillers.verify_gradients()
        # Neither the biases', which warms up downwards, nor one of those that Ultralytics triples with Muon.
        self.distillation.distillers.after_step(self.optimizer.param_groups[1]['lr'])

    def state_beside(self) -> dict[str, Any]:
        return {'distillers': self.distillation.distillers.state_dict()}

    def load_state_beside(self, state: dict[str, Any] | None) -> None:
        if not state or 'distillers' not in state:
            raise ConfigError(
                f'{self.last}: holds no unfinished distillation (no connectors) and can not be resumed; start a new run'
            )
        try:
            self.distillation.distillers.load_state_dict(state['distillers'])
        except RuntimeError as error:
            raise ConfigError(
                f'{self.args.distill_model}: its distillers are not those of the run that is resumed ({error}); resume '
                'with the config that it was started with'
            ) from None


class DistillationTrainer(OnViews, Distilling, DetectionTrainer):
    """Ultralytics' detection trainer, with a teacher.

    ``YOLO('yolo11n.yaml').train(trainer=kd_dense.yolo.DistillationTrainer, distill_model='config.py', data=..., ...)``
    """

    task = 'detect'


class StudentTrainer(OnViews, Untimed, DetectionTrainer):
    """Ultralytics' detection trainer: the student alone, validated like the distilled one."""


class SegmentationStudentTrainer(OnViews, Untimed, SegmentationTrainer):
    """Ultralytics' instance segmentation trainer: the student alone, validated like the distilled one."""


class SegmentationDistillationTrainer(OnViews, Distilling, SegmentationTrainer):
    """Ultralytics' instance segmentation trainer, with a teacher; used like :class:`DistillationTrainer`."""

    task = 'segment'


def require_dataset(data: str, split: str = 'val', key: str = 'data') -> dict:
    """The data set that the YAML ``data`` describes, which the entry ``key`` of the config names.

    Raises:
        ConfigError: no such YAML, or images that are not there. They are not downloaded.
    """
    if not data:
        raise ConfigError(f'{key}: give the path of a data YAML')
    try:
        return check_det_dataset(data, autodownload=False, split=split)
    except FileNotFoundError as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f'{key}: {reason}; put the images there, or give another data YAML') from None


def _forget_rows_after(epochs: int, path: Path) -> None:
    """Delete the rows of later epochs from a results file: Ultralytics writes the row before the checkpoint."""
    if path.is_file():
        header, *rows = path.read_text().splitlines()
        kept = [header, *(row for row in rows if int(float(row.split(',')[0])) <= epochs)]
        with atomic_write(path) as file:
            file.write(('\n'.join(kept) + '\n').encode())


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
