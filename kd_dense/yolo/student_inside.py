"""What the models that Ultralytics' trainer trains around a student have in common."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.nn.distill_model import DistillationModel as UltralyticsDistillationModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import copy_attr

from kd_dense.compilation import or_uncompiled


class StudentInsideModel(UltralyticsDistillationModel):
    """Ultralytics' own distillation model, of which the student and a teacher out of reach are left.

    It is a subclass because the trainer treats that class specially: no compilation, class weights, the EMA copy, the
    optimizer's learning-rate groups and the resumption of two-branch losses all look through it to ``student_model``.
    The teacher is not a submodule: it is in no parameter list, state dict, optimizer, EMA copy or checkpoint.

    Args:
        student: the model to be trained, on its device.
    """

    def __init__(self, student: nn.Module) -> None:
        nn.Module.__init__(self)
        self.student_model = student
        # What the parent class keeps for its permanent hooks; empty, because there are none.
        self.feats_idx, self.teacher_feats_idx = [], []
        self._teacher_feats, self._student_feats = {}, {}
        self._teacher_hooks, self._student_hooks = [], []
        copy_attr(self, student)  # yaml, names, stride, args: what the trainer reads from its model
        self._teacher: Any = None
        self.iteration, self.epoch, self.progress = 0, 0, 0.0

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher; ``None`` where there is none, as on the copy that holds the moving average."""
        return self._teacher and self._teacher.model

    @teacher_model.setter
    def teacher_model(self, value: None) -> None:
        self._teacher = None  # Ultralytics takes the teacher off the moving average's copy

    def compile_student(self, mode: str | bool = 'default', backend: str = 'inductor') -> None:
        """Have ``torch.compile`` compile the student's forward.

        In place: names of modules and tensors stay as they are, and copies (the moving average, a checkpoint) are not
        compiled. Where compiling fails, the training goes on without: :func:`~kd_dense.compilation.or_uncompiled`.

        Args:
            mode: of ``torch.compile``; ``True`` is ``'default'``, as for Ultralytics' argument ``compile``.
        """
        options = {'mode': 'default' if mode is True else mode, 'backend': backend}
        self.student_model.compile(**or_uncompiled(options, LOGGER.warning))

    def _apply(self, fn, recurse: bool = True) -> StudentInsideModel:
        super()._apply(fn, recurse)
        if self._teacher is not None:
            self._teacher.follow(fn)
        return self
