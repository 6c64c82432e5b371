"""The hook that ties :class:`~kd_dense.MeanTeacherAdaptation` to MMEngine's runner."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_dense.adaptation.collapse import CollapseWatch
from kd_dense.engine.companions import bring_companions
from kd_dense.engine.hook import STATE_KEY, evaluate
from kd_dense.errors import ConfigError, Interrupted, closest
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import HOOKS

SAVES = ('student', 'mean_teacher')


@HOOKS.register_module()
class AdaptationHook(Hook):
    """Moves the mean teacher after each step of the optimizer, scores it, and stores it in checkpoints.

    The teacher begins as the student is when training begins, whatever was loaded into it. With
    ``optim_wrapper.accumulative_counts`` it moves when the optimizer does. Checkpoints have its state under the key
    ``kd_dense``, beside the plain weights. The log has what became of pseudo labels since the last validation: of a
    segmentor ``adapt.kept``, the share of the target's pixels that got one; of a detector ``adapt.per_image``, boxes,
    and ``adapt.score``, their mean score; and ``adapt.precision`` where the target has labels (which nothing is trained
    on). It warns once when there are less than a tenth as many as there were. After each validation it has the scores
    of the teacher as ``teacher.METRIC``.

    It brings along the hooks of :func:`~kd_dense.engine.companions.bring_companions`.

    Args:
        evaluate_teacher: score the teacher too, after each validation of the student. Takes as long as that.
        save: ``'student'`` or ``'mean_teacher'``: whose plain weights a checkpoint holds for the stock toolbox. A
            resumed run goes on with both either way.
        interval: iterations from one report on pseudo labels to the next; each asks the device for a few numbers.

    Raises:
        ConfigError: an unknown value of ``save``.
    """

    # before the EMA hook and the checkpoint hook, which copy and write what this one restores
    priority = 'ABOVE_NORMAL'

    def __init__(self, evaluate_teacher: bool = True, save: str = 'student', interval: int = 50) -> None:
        if save not in SAVES:
            raise ConfigError(f'custom_hooks: AdaptationHook: unknown save {save!r}; {closest(str(save), SAVES)}')
        self.evaluate_teacher, self.save, self.interval = evaluate_teacher, save, interval
        self._resumed = False
        self._collapse = CollapseWatch()

    def before_run(self, runner: Runner) -> None:
        bring_companions(runner)

    def before_train(self, runner: Runner) -> None:
        model = adaptation_of(runner)
        if model is None:
            raise ConfigError(
                "model: AdaptationHook needs a model of type 'kd_dense.MeanTeacherAdaptation', and this config has "
                'another; remove the hook to train without adaptation'
            )
        if not self._resumed:
            model.mean_teacher.reset(model.student)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        adaptation_of(runner).progress = runner.iter / max(runner.max_iters, 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        model = adaptation_of(runner)
        if runner.optim_wrapper.should_update():  # it has just stepped
            model.mean_teacher.update(model.student)
        if (runner.iter + 1) % self.interval == 0:
            report = model.statistics.report()
            for name in ('kept', 'per_image', 'score', 'precision'):
                if name in report:
                    runner.message_hub.update_scalar(f'train/adapt.{name}', report[name])
            if sentence := self._collapse(report.get('per_image', report.get('kept'))):
                print_log(sentence, 'current', logging.WARNING)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        model = adaptation_of(runner)
        if model is None:
            return
        classes = runner.val_dataloader.dataset.metainfo.get('classes')
        report = model.statistics.report(classes)
        model.statistics.reset()
        if report:
            text = ', '.join(f'{name} {value:.4g}' for name, value in report.items())
            print_log(f'pseudo labels since the last validation: {text}', 'current')
        if not self.evaluate_teacher:
            return
        try:
            with preserve_random_state():  # a data loader draws a seed: the student must not notice
                found = evaluate(model.mean_teacher.model, runner)
        except Interrupted:  # a signal: the run is saved and stopped after its next iteration
            return
        for name, value in found.items():
            runner.message_hub.update_scalar(f'val/teacher.{name}', value)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = adaptation_of(runner)
        if model is None:
            return
        checkpoint[STATE_KEY] = {'mean_teacher': {k: v.cpu() for k, v in model.mean_teacher.state_dict().items()}}
        if self.save == 'mean_teacher':
            checkpoint[STATE_KEY]['student'] = checkpoint['state_dict']
            checkpoint['state_dict'] = {k: v.cpu() for k, v in model.mean_teacher.model.state_dict().items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = adaptation_of(runner)
        if model is None or not runner._resume:
            return
        state = checkpoint.get(STATE_KEY) or {}
        if 'mean_teacher' not in state:
            raise ConfigError(
                'resume: the checkpoint has no mean teacher, so it can not be resumed, only started from with load_from'
            )
        model.mean_teacher.load_state_dict(state['mean_teacher'])
        if 'student' in state:
            checkpoint['state_dict'] = state['student']
        self._resumed = True


def adaptation_of(runner: Runner) -> Any:
    """The :class:`~kd_dense.MeanTeacherAdaptation` that the runner trains, wrapped or not; ``None`` for others."""
    from kd_dense.models import MeanTeacherAdaptation

    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model if isinstance(model, MeanTeacherAdaptation) else None
