"""The hook that ties :class:`~kd_dense.Distillation` to MMEngine's runner."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_dense.analysis.doctor.scores import weak_teacher
from kd_dense.analysis.doctor.weights import about_weights
from kd_dense.analysis.tap_table import tap_table
from kd_dense.engine.companions import bring_companions
from kd_dense.engine.score import score
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import HOOKS
from kd_dense.teacher import match_classes

#: Key of the distillation state in a checkpoint, beside ``state_dict``.
STATE_KEY = 'kd_dense'


@HOOKS.register_module()
class DistillationHook(Hook):
    """Runs the checks and keeps the clock of a distillation.

    Before training it compares class lists by name, prints the table of taps, makes sure that every connector is in the
    optimizer, and scores the teacher on the validation set (once: the score is kept in ``work_dir/teacher_score.json``
    and used again while weights and data stay the same). While training it tells the model the progress, and after the
    first backward checks that every connector received a gradient. Checkpoints get the distillation state under the key
    ``kd_dense``, beside the student's plain weights.

    It brings along the hooks of :func:`~kd_dense.engine.companions.bring_companions`.

    Args:
        score_teacher: run the validation loop once with the teacher before training. Takes as long as one validation.
    """

    # before the EMA hook and the checkpoint hook, which copy and write what this one restores
    priority = 'ABOVE_NORMAL'

    def __init__(self, score_teacher: bool = True) -> None:
        self.score_teacher = score_teacher
        self.teacher_score: dict[str, float] | None = None

    # -- start ---------------------------------------------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        bring_companions(runner)

    def before_train(self, runner: Runner) -> None:
        model = distillation_of(runner)
        if model is None:
            raise ConfigError(
                "model: DistillationHook needs a model of type 'kd_dense.Distillation', and this config has another; "
                'remove the hook to train a student alone'
            )
        self._clock(runner, model)
        live = self._with_live_teacher(runner, model)
        student_classes = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        teacher_classes = (model.teacher_meta.get('dataset_meta') or {}).get('classes')
        if model.teacher_classes != 'ignore':
            match_classes(student_classes, teacher_classes, model.teacher_classes)
        self._check_optimizer(runner, model)
        print_log('\n' + tap_table(model.distillers.table), 'current')
        nothing, sentences = about_weights(model.distillers)
        if self.score_teacher and runner.val_loop is not None and live is not None:
            self.teacher_score = self._score(runner, live)
            text = ', '.join(f'{k} {v:.4g}' for k, v in self.teacher_score.items())
            print_log(f'teacher on the validation set: {text}', 'current')
            sentences.append(self._about_teacher(runner, student_classes))
        for sentence in filter(None, [nothing, *sentences]):
            print_log(sentence, 'current', logging.WARNING)

    @staticmethod
    def _with_live_teacher(runner: Runner, model: Any) -> Any:
        """The model; or, while it has a cache instead of a teacher, one that has it, if the teacher's file is there."""
        from kd_dense.cache.teacher import CachedTeacher  # these need kd_dense.models
        from kd_dense.cache.verify import verify

        if not isinstance(model.teacher, CachedTeacher):
            return model
        return verify(runner.cfg, model, runner.train_dataloader)

    def _about_teacher(self, runner: Runner, classes: list[str] | None) -> str | None:
        from kd_dense.engine.run import _metric  # that module needs this one

        metric = _metric(runner.cfg)
        if metric is None:
            return None
        value = self.teacher_score.get(metric[0])
        return weak_teacher(value and metric[1] * value, metric[0].rpartition('/')[2], classes and len(classes))

    def _check_optimizer(self, runner: Runner, model: Any) -> None:
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if hasattr(wrapper, 'values') else [wrapper]
        trained = {id(p) for w in wrappers for group in w.optimizer.param_groups for p in group['params']}
        for name, parameter in model.distillers.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                raise DistillationError(
                    f'optim_wrapper: the connector parameter {name} is not in the optimizer; '
                    'check its constructor and paramwise_cfg'
                )

    def _score(self, runner: Runner, model: Any) -> dict[str, float]:
        key = _fingerprint(model.teacher.model, runner.val_dataloader.dataset)
        path = Path(runner.work_dir) / 'teacher_score.json'
        found = [None]
        if is_main_process() and path.is_file():
            try:
                stored = json.loads(path.read_text())
                found = [stored['score'] if stored.get('key') == key else None]
            except (json.JSONDecodeError, KeyError, TypeError):
                pass  # a broken cache is no cache
        broadcast_object_list(found)
        if found[0] is not None:
            return found[0]
        with preserve_random_state():  # a data loader draws a seed: the student must not notice
            found = evaluate(model.teacher.model, runner)
        if is_main_process():
            path.write_text(json.dumps({'key': key, 'score': found}, indent=1))
        return found

    # -- clock ---------------------------------------------------------------------------------------------------------

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._clock(runner, distillation_of(runner))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        distillers = distillation_of(runner).distillers
        distillers.verify_gradients()
        # the base rate comes first, where there are multiples of it
        distillers.after_step(next(iter(runner.optim_wrapper.get_lr().values()))[0])

    @staticmethod
    def _clock(runner: Runner, model: Any) -> None:
        model.iteration, model.epoch = runner.iter, runner.epoch
        model.progress = runner.iter / max(runner.max_iters, 1)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = distillation_of(runner)
        if model is not None:
            state = {k: v.cpu() for k, v in model.distillation_state().items()}
            checkpoint[STATE_KEY] = {'distillers': state}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = distillation_of(runner)
        if model is None or not runner._resume:
            return
        if STATE_KEY not in checkpoint:
            raise ConfigError(
                'resume: the checkpoint has no distillation state, so it can not be resumed, only '
                'started from with load_from'
            )
        model.load_distillation_state(checkpoint[STATE_KEY]['distillers'])


def distillation_of(runner: Runner) -> Any:
    """The :class:`~kd_dense.Distillation` that the runner trains, wrapped or not; ``None`` for other models."""
    from kd_dense.models import Distillation

    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model if isinstance(model, Distillation) else None


def evaluate(model: torch.nn.Module, runner: Runner) -> dict[str, float]:
    """Score ``model`` by its own ``val_step``, on the runner's validation data, with a fresh copy of its evaluator."""
    evaluator = runner.build_evaluator(
        runner._val_evaluator if isinstance(runner._val_evaluator, (dict, list)) else runner.cfg.val_evaluator
    )
    return score(model, runner.val_dataloader, evaluator)


def _fingerprint(model: torch.nn.Module, dataset: Any) -> str:
    """A hash of the weights and of what says which data they are scored on."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    settings = {
        'type': type(dataset).__name__,
        'length': len(dataset),
        'classes': list(getattr(dataset, 'metainfo', {}).get('classes') or ()),
        'first': str(dataset.get_data_info(0)) if len(dataset) else '',
        'pipeline': str(getattr(dataset, 'pipeline', '')),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()
