"""Keeps gradients that are being accumulated across an interruption."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from kd_dense.registry import HOOKS

_KEY = 'kd_dense_gradients'


def pending_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> gradient, on the CPU."""
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


def put_back(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Give the parameters the gradients that :func:`pending_gradients` returned."""
    for name, parameter in model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter, copy=True)


@HOOKS.register_module()
class GradientHook(Hook):
    """With ``optim_wrapper.accumulative_counts``: stores the gradients of iterations that no update has used yet.

    MMEngine drops them on resume. With several processes each has gradients of its own, and they are dropped as well.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if hasattr(wrapper, 'values') else [wrapper]
        if get_world_size() == 1 and 'optimizer' in checkpoint and not all(w.should_update() for w in wrappers):
            checkpoint[_KEY] = pending_gradients(_bare(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume:
            self._gradients = checkpoint.get(_KEY, {})

    def before_train(self, runner: Runner) -> None:
        put_back(_bare(runner), self._gradients)
        self._gradients = {}


def _bare(runner: Runner) -> Any:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
