"""Lets a resumed run draw the random numbers that the uninterrupted one would have drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from kd_dense.engine.loops import ResumableEpochLoop
from kd_dense.random_state import capture, restore
from kd_dense.registry import HOOKS

_KEY = 'kd_dense_random_state'


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Stores the random states in checkpoints and puts them back on resume; MMEngine itself starts again from the seed.

    A resumed run first draws the batches of the iterations that are done: all of them in an iteration-based run, those
    of the current epoch in an epoch-based one (where the loop is :class:`ResumableEpochLoop`; MMEngine's own begins the
    epoch anew). Then the states are put back. With several processes none is put back: a checkpoint holds the states of
    one.
    """

    priority = 'VERY_LOW'  # when a checkpoint is saved, whatever draws in that step has drawn

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def before_val(self, runner: Runner) -> None:
        self._before_validation = capture()

    def after_val(self, runner: Runner) -> None:
        restore(self._before_validation)
        self._before_validation = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # A checkpoint of the best score is written before the validation has ended.
        now = self._before_validation or capture()
        checkpoint[_KEY] = {'now': now, 'before_epoch': self._epoch_start}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self._resumed = checkpoint.get(_KEY, {})

    def before_train_epoch(self, runner: Runner) -> None:
        state, self._resumed = self._resumed, None
        loop = runner.train_loop
        if state is not None:
            put_back = (lambda: restore(state['now'])) if state and get_world_size() == 1 else (lambda: None)
            if not isinstance(loop, EpochBasedTrainLoop):
                loop.dataloader_iterator = _Then(loop.dataloader_iterator, loop.iter, put_back)
            elif self._begin_inside(loop):
                if state and get_world_size() == 1:
                    restore(state['before_epoch'])
                loop.skipped = put_back
            else:
                put_back()
        self._epoch_start = capture()

    @staticmethod
    def _begin_inside(loop: EpochBasedTrainLoop) -> bool:
        """Was the checkpoint written in the middle of an epoch? Then tell the loop how many of its batches are done."""
        done = loop.iter - loop.epoch * len(loop.dataloader)
        if not isinstance(loop, ResumableEpochLoop) or not 0 < done <= len(loop.dataloader):
            return False
        loop.skip = done
        return True


class _Then:
    """An iterator that calls ``then`` once, after ``count`` items."""

    def __init__(self, iterator: Iterator, count: int, then: Callable[[], None]) -> None:
        self._iterator, self._left, self._then = iterator, count, then

    def __iter__(self) -> _Then:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._left -= 1
        if self._left == 0:
            self._then()
        return item

    def skip_iter(self, count: int) -> None:
        """Draw ``count`` items, as the loop of the fork of MMEngine asks; its own shortcut draws no random numbers."""
        for _ in range(count):
            next(self)
