"""Hooks that stop a run in time: when it computes nonsense, and when a signal asks for it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_dense import stopping
from kd_dense.checkpoint import atomic_write, latest
from kd_dense.errors import DistillationError, Interrupted
from kd_dense.registry import HOOKS

#: The checkpoint of a run that was asked to stop.
FILE_NAME = 'interrupted.pth'


@HOOKS.register_module()
class FiniteHook(Hook):
    """Stops the run when a loss is not finite, and writes no checkpoint with weights that are not.

    Losses are looked up in MMEngine's log. With :class:`~kd_dense.engine.DeferredLogHook` this waits until they have
    been brought to the host anyway, which is when a line is logged; at the latest before a validation, before a
    checkpoint is written, and at the end of an epoch. It says in which iteration it was. Weights are checked once per
    checkpoint.
    """

    # The logger has printed the line by then, the moving average is in the checkpoint, and no file has been written.
    priority = 'LOW'

    def __init__(self) -> None:
        self._unread: list[tuple[int, list[str]]] = []  # iteration, names of its losses

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        logged = runner.message_hub.log_scalars
        names = [k for k in outputs or {} if 'loss' in k and f'train/{k}' in logged]
        self._unread.append((runner.iter + 1, names))
        if not any(getattr(logged[f'train/{k}'], 'waits', False) for k in names):
            self._read(runner)

    def before_val(self, runner: Runner) -> None:
        self._read(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        self._read(runner)

    def _read(self, runner: Runner) -> None:
        """Look at the losses of the iterations since this was done last, the earliest first."""
        unread, self._unread = self._unread, []
        counts = Counter(name for _, names in unread for name in names)
        logged = runner.message_hub.log_scalars
        values = {name: iter(logged[f'train/{name}'].data[0][-n:].tolist()) for name, n in counts.items()}
        for iteration, names in unread:
            self._judge(runner, iteration, {name: next(values[name]) for name in names})

    @staticmethod
    def _judge(runner: Runner, iteration: int, values: dict[str, float]) -> None:
        wrong = {k: v for k, v in values.items() if not math.isfinite(v)}
        if not wrong:
            return
        terms = {k: v for k, v in wrong.items() if k != 'loss'} or wrong
        if len(terms) > 1 and len(terms) >= len(values) - 1:
            cause = (
                'all terms at once, so the weights were ruined before; lower the learning rate, or limit the gradient '
                'with optim_wrapper.clip_grad=dict(max_norm=...)'
            )
        else:
            ours = [f'distillers.{k.split(".")[1]}' for k in terms if k.startswith('kd.')]
            cause = (
                f'look at {" and ".join(ours)}, its loss_weight and the teacher'
                if ours
                else ('a loss of the student itself; look at its labels and at the learning rate')
            )
        found = ', '.join(f'{k} is {v}' for k, v in terms.items())
        raise DistillationError(f'loss not finite in iteration {iteration}: {found} ({cause}); {_kept(runner)}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._read(runner)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        tensors |= {n: b for n, b in model.named_buffers() if n.endswith(('running_mean', 'running_var'))}
        if not tensors:
            return
        finite = torch.stack([t.detach().isfinite().all() for t in tensors.values()]).tolist()
        wrong = [name for name, good in zip(tensors, finite, strict=True) if not good]
        if wrong:
            more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
            raise DistillationError(
                f'weights not finite after iteration {runner.iter + 1}: {", ".join(wrong[:3])}{more}, so no checkpoint '
                f'was written; lower the learning rate; {_kept(runner)}'
            )


@HOOKS.register_module()
class StopHook(Hook):
    """Saves the state in ``work_dir/interrupted.pth`` and ends the run when SIGINT or SIGTERM arrived.

    That happens between two iterations, also in the middle of an epoch or of a validation. Needs
    :func:`kd_dense.stopping.stop_signals` around the run. Several processes agree on it every ``interval`` iterations,
    and not during a validation.

    Raises:
        Interrupted: after saving.
    """

    priority = 'LOWEST'  # everything else has done its part of the iteration
    interval = 10

    def __init__(self) -> None:
        self._training = False

    def before_train(self, runner: Runner) -> None:
        self._training = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        number = self._agreed(runner)
        if number is not None:
            self._stop(runner, number, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self._training or get_world_size() > 1 or stopping.requested() is None:
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.after_val_epoch(runner)  # takes the averaged weights out of the model again
        self._stop(runner, stopping.requested(), runner.iter)

    def after_train(self, runner: Runner) -> None:
        self._training = False
        if is_main_process():  # the run is complete, and its last checkpoint is a regular one
            (Path(runner.work_dir) / FILE_NAME).unlink(missing_ok=True)

    def _agreed(self, runner: Runner) -> int | None:
        number = stopping.requested()
        if get_world_size() == 1:
            return number
        if (runner.iter + 1) % self.interval:
            return None
        device = next(runner.model.parameters()).device
        flag = torch.tensor(number or 0, device=device)
        all_reduce(flag, 'max')
        return int(flag) or None

    @staticmethod
    def _stop(runner: Runner, number: int, done: int) -> NoReturn:
        meta = {'epoch': runner.epoch, 'iter': done}
        runner.save_checkpoint(runner.work_dir, FILE_NAME, meta=meta, by_epoch=False)
        path = Path(runner.work_dir) / FILE_NAME
        if is_main_process():
            with atomic_write(Path(runner.work_dir) / 'last_checkpoint') as file:
                file.write(str(path).encode())
        raise Interrupted(
            f'{stopping.name_of(number)} after iteration {done} of {runner.max_iters}; nothing is lost: go on from '
            f'{path} with --resume',
            number,
        )


def _kept(runner: Runner) -> str:
    """What is left of a run that had to stop."""
    path = latest(runner.work_dir)
    if path is None:
        return 'no checkpoint had been written before'
    return f'the last good checkpoint is {path}, from which --resume goes on after the change'
