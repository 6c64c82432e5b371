"""What the doctor needs to know about a toolbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.distillation import Distillers
from kd_dense.teacher import LoadReport, Normalization

#: What the doctor and the benchmark say of a config that adapts.
ADAPTS = (
    'this is an adaptation, whose teacher is the moving average of its student, so that there is no trained teacher to '
    'look at; train it, and read its log (docs/adaptation.md)'
)


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher and how it came to be.

    Args:
        model: with its weights, frozen.
        report: of the loading; ``None`` for a model that was built elsewhere.
        source: its file.
        allow: prefixes of tensors that were permitted to differ.
        trusted: was the file read without restrictions?
    """

    model: nn.Module
    report: LoadReport | None
    source: str | None
    allow: tuple[str, ...] = ()
    trusted: bool = False


@dataclass(frozen=True)
class Data:
    """How much there is to train and to validate on."""

    train_images: int
    val_images: int
    batch_size: int


@dataclass(frozen=True)
class Metric:
    """The number that counts: its key among the scores, its name, and the factor to percent."""

    key: str
    name: str
    percent: float


@dataclass(frozen=True)
class Classes:
    """Class lists of both sides (``None``: not known) and what ``teacher.classes`` says about them."""

    student: list[str] | None
    teacher: list[str] | None
    mapping: Mapping[str, str] | str | None = None


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation of both sides (``None``: not known) and the size of the teacher's input over the student's."""

    student: Normalization | None
    teacher: Normalization | None
    scale: float = 1.0


class Toolbox(ABC):
    """One config, in the toolbox that it is for.

    The methods are called in the order in which they stand here; one that needs the result of another is not called
    when that one failed. Each may raise :class:`~kd_dense.errors.ConfigError` or
    :class:`~kd_dense.errors.DistillationError`, whose sentence becomes the finding.

    Attributes:
        name: ``'mmseg'``, ``'mmdet'`` or ``'ultralytics'``.
        config: path of the config.
        packages: modules without which nothing works, for the table of versions.
        needs_operators: are the compiled operators of mmcv used?
        device: where the models are put.
    """

    name: str
    config: str
    packages: tuple[str, ...]
    needs_operators: bool
    device: torch.device

    @abstractmethod
    def check_config(self) -> None:
        """Check the parts of the config that are ours for unknown keys."""

    @abstractmethod
    def check_distillers(self) -> list[str]:
        """Build the distillers from the config, without any model, to see whether that works; their names."""

    @abstractmethod
    def load_teacher(self) -> LoadedTeacher:
        """Build, load and freeze the teacher."""

    @abstractmethod
    def open_data(self) -> Data:
        """Open the training and the validation set."""

    @abstractmethod
    def build_student(self) -> nn.Module:
        """Build the student as the training does, with the weights that it would start from."""

    def unscored(self) -> str | None:
        """Why the teacher can not be scored by this toolbox, in one sentence; ``None``: it can."""
        return None

    @abstractmethod
    def score(self, side: str, count: int | None) -> dict[str, float]:
        """Score ``'teacher'`` or ``'student'`` by the toolbox's own evaluator.

        Args:
            count: images, spread evenly over the validation set; ``None``: all.
        """

    @abstractmethod
    def metric(self) -> Metric | None:
        """The number that counts among the scores, if it is known."""

    @abstractmethod
    def classes(self) -> Classes:
        """The class lists."""

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How either side wants its images."""

    @abstractmethod
    def join(self) -> Distillers:
        """Join student, teacher and distillers, ready for training steps; the distillers are set up."""

    @abstractmethod
    def batches(self, count: int) -> Iterator[Any]:
        """Training batches on the device, as the training would see them."""

    @abstractmethod
    def step(self, batch: Any) -> Tensor:
        """Loss of the task in a training step with distillation, in the unit of the distillers' losses."""

    @abstractmethod
    def student_step(self, batch: Any) -> Tensor:
        """Loss of the task in a training step of the student alone."""

    @abstractmethod
    def teacher_step(self, batch: Any) -> None:
        """Forward of the teacher, as far as its deepest tap."""

    def precision(self) -> AbstractContextManager:
        """The context in which the training runs its forward: mixed precision, or nothing."""
        return nullcontext()

    def close(self) -> None:
        """Remove what was written while looking."""
        return
