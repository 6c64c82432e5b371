"""Hooks for MMEngine's runner, and the functions that the tools call."""

from kd_dense.engine.hook import DistillationHook
from kd_dense.engine.random_state_hook import RandomStateHook
from kd_dense.engine.record_hook import RecordHook

__all__ = ['DistillationHook', 'RandomStateHook', 'RecordHook']
