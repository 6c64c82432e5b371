"""What the benchmark needs to know about a toolbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Other ways to train the student, for ``--against``; the first is measured always.
RIVALS = ('student', 'native', 'mmrazor-style', 'cached')


@dataclass(frozen=True)
class Options:
    """What a user may ask for instead of what the config says.

    Args:
        image_size: ``(H, W)`` of the made-up images; ``None``: what the training of the config sees.
        batch: images; ``None``: as in the config.
        boxes: objects in each image, for detectors.
        random_teacher: leave the teacher at its initialisation and read no file.
        seed: of the batch and of the initialisations.
    """

    image_size: tuple[int, int] | None = None
    batch: int | None = None
    boxes: int = 7
    random_teacher: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Facts:
    """What was measured, for the line above the table.

    Args:
        toolbox: ``'mmseg'``, ``'mmdet'`` or ``'ultralytics'``.
        device: ``'cpu'`` or ``'cuda'``.
        image_size: ``(H, W)`` of the batch.
        batch: its images.
        optimizer: its type.
        precision: ``'fp32'`` or ``'mixed precision'``.
        random_teacher: is the teacher at its initialisation?
        student_parameters, teacher_parameters: how many.
    """

    toolbox: str
    device: str
    image_size: tuple[int, int]
    batch: int
    optimizer: str
    precision: str
    random_teacher: bool
    student_parameters: int
    teacher_parameters: int


@dataclass(frozen=True)
class Work:
    """A training step, or the forward of a teacher.

    Args:
        forward: everything up to the loss, a scalar; ``None`` where nothing is trained.
        update: backward and optimizer, from that loss; leaves no gradients behind.
        modules: what is trained.
    """

    forward: Callable[[], Tensor | None]
    update: Callable[[Tensor], None] | None = None
    modules: Sequence[nn.Module] = ()

    def __call__(self) -> None:
        loss = self.forward()
        if self.update is not None:
            self.update(loss)


class Bench(ABC):
    """One distillation config, ready to be timed without its data set.

    Learning rates are 0: the optimizer does all its work, and every repetition computes the same.

    Attributes:
        name: of the config, for the table.
        rivals: those of :data:`RIVALS` that this toolbox can run.
        device: where everything is.
    """

    name: str
    rivals: tuple[str, ...]
    device: torch.device

    @abstractmethod
    def prepare(self) -> Facts:
        """Build student, teacher and batch."""

    @abstractmethod
    def distillers(self) -> Mapping[str, Mapping]:
        """Those of the config: name -> ``dict(type=..., ...)``."""

    @abstractmethod
    def variant(
        self, distillers: Mapping[str, Mapping], against: Sequence[str]
    ) -> AbstractContextManager[dict[str, Work]]:
        """Join student and teacher by these distillers, every one at its full loss weight.

        Args:
            against: those of :attr:`rivals` that are wanted too.

        Returns:
            ``'student'``: a training step of the student alone; ``'teacher'``: its forward to its deepest tap;
            ``'step'``: a training step with distillation; and one entry for each of ``against``.
        """

    def close(self) -> None:
        """Remove what was written."""
        return
