"""What the models that train a student with something beside it have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import BaseModel
from torch import nn


class StudentInside(BaseModel):
    """An MMEngine model that, to its surroundings, is the student in it.

    ``state_dict`` gives and takes the student's plain weights, and attributes that it does not have are looked up on
    the student (hooks that set ``model.bbox_head.use_l1``, say). What else is in it is no part of a checkpoint's
    weights; hooks store it beside them.

    Args:
        student: the model that is trained.
        data_preprocessor: of the whole.
    """

    def __init__(self, student: nn.Module, data_preprocessor: nn.Module | None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.student = student
        self._own_names = False
        self._register_load_state_dict_pre_hook(self._plain_to_own)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get('_modules') or {}
            if name.startswith('__') or 'student' not in modules:
                raise
            return getattr(modules['student'], name)

    def state_dict(
        self, *args: Any, destination: dict | None = None, prefix: str = '', keep_vars: bool = False
    ) -> dict:
        """The student's plain state dict: the weights of a checkpoint."""
        if args:  # the positional form that torch still accepts
            destination, prefix, keep_vars = (*args, *(destination, prefix, keep_vars)[len(args) :])
        if self._own_names:
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.student.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    @contextmanager
    def all_under_own_names(self) -> Iterator[None]:
        """Inside, ``state_dict`` gives what a module of this structure gives: ``student.*`` and all else."""
        self._own_names = True
        try:
            yield
        finally:
            self._own_names = False

    def _plain_to_own(self, state_dict: dict, prefix: str, *_: Any) -> None:
        """Before loading: move the student's plain keys under ``student.``; the rest of this model stays as it is."""
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f'{prefix}student.{key[len(prefix) :]}'] = state_dict.pop(key)
        # What is beside a plain student (connectors, calibrated weights) arrives by another way.
        for name, module in self.named_children():
            if name != 'student':
                module.state_dict(destination=state_dict, prefix=f'{prefix}{name}.')

    def init_weights(self) -> None:
        """Initialise the student as its own config says; what is beside it keeps its initialisation."""
        if hasattr(self.student, 'init_weights'):
            self.student.init_weights()
