"""The hooks that every training of ours runs with."""

from __future__ import annotations

from mmengine.runner import Runner

from kd_dense.engine.compile_hook import CompileHook
from kd_dense.engine.deferred_log import defer_log
from kd_dense.engine.gradient_hook import GradientHook
from kd_dense.engine.random_state_hook import RandomStateHook
from kd_dense.engine.safety_hooks import FiniteHook


def bring_companions(runner: Runner) -> None:
    """Register :class:`FiniteHook`, :class:`RandomStateHook` and :class:`GradientHook`, where the config names none.

    :class:`~kd_dense.engine.DeferredLogHook` takes the place of MMEngine's ``RuntimeInfoHook``. Where compiling fails,
    a run goes on: :class:`~kd_dense.engine.compile_hook.CompileHook`.
    """
    defer_log(runner)
    for companion in (FiniteHook, RandomStateHook, GradientHook, CompileHook):
        if not any(isinstance(hook, companion) for hook in runner.hooks):
            runner.register_hook(companion())
    next(hook for hook in runner.hooks if isinstance(hook, CompileHook)).take_over(runner)
