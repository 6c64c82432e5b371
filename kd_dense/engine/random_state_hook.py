"""Lets a resumed run draw the random numbers that the uninterrupted one would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from kd_dense.registry import HOOKS

_KEY = 'kd_dense_random_state'


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Stores the random states in checkpoints and puts them back on resume; MMEngine itself starts again from the seed.

    In an epoch-based run everything is put back when the next epoch begins. An iteration-based run first draws the
    batches that were seen before, which brings the states of Python and NumPy, from which augmentations draw, to where
    they were; torch's is put back after that. With several processes nothing is put back: a checkpoint holds the states
    of one.
    """

    priority = 'VERY_LOW'  # when a checkpoint is saved, whatever draws in that step has drawn

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] = {}

    def before_val(self, runner: Runner) -> None:
        self._before_validation = _current()

    def after_val(self, runner: Runner) -> None:
        _restore(self._before_validation)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint[_KEY] = _current()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and get_world_size() == 1:
            self._pending = checkpoint.get(_KEY)

    def before_train_epoch(self, runner: Runner) -> None:
        if self._pending is not None and isinstance(runner.train_loop, EpochBasedTrainLoop):
            _restore(self._pending)
            self._pending = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._pending is not None:
            _restore_torch(self._pending)
            self._pending = None


def _current() -> dict[str, Any]:
    """The random states of Python, NumPy and torch, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': {'name': name, 'keys': torch.from_numpy(keys.astype(np.int64)), 'rest': tuple(rest)},
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(state: dict[str, Any]) -> None:
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    numpy = state['numpy']
    np.random.set_state((numpy['name'], numpy['keys'].numpy().astype(np.uint32), *numpy['rest']))
    _restore_torch(state)


def _restore_torch(state: dict[str, Any]) -> None:
    torch.set_rng_state(state['torch'])
    if state['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state['cuda'])
