"""Hooks for MMEngine's runner, and the functions that the tools call."""

from kd_dense.engine.adaptation_hook import AdaptationHook
from kd_dense.engine.deferred_log import DeferredLogHook
from kd_dense.engine.gradient_hook import GradientHook
from kd_dense.engine.hook import DistillationHook
from kd_dense.engine.loops import ResumableEpochLoop
from kd_dense.engine.pretraining_hook import PretrainingHook
from kd_dense.engine.random_state_hook import RandomStateHook
from kd_dense.engine.record_hook import RecordHook
from kd_dense.engine.safety_hooks import FiniteHook, StopHook

__all__ = [
    'AdaptationHook',
    'DeferredLogHook',
    'DistillationHook',
    'FiniteHook',
    'GradientHook',
    'PretrainingHook',
    'RandomStateHook',
    'RecordHook',
    'ResumableEpochLoop',
    'StopHook',
]
