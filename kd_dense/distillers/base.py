"""The interface of a distiller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.errors import ConfigError

#: What a config may write under ``taps``: a name or names for both sides, or ``dict(student=..., teacher=...)``.
TapConfig = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class TapPair:
    """Tap names of one role: those of the student and those of the teacher (either may be empty)."""

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()

    @classmethod
    def parse(cls, taps: TapConfig) -> TapPair:
        """From the config value ``taps``.

        Raises:
            ConfigError: neither names nor a dict with exactly the keys ``student`` and ``teacher``.
        """
        if isinstance(taps, Mapping):
            if set(taps) != {'student', 'teacher'}:
                raise ConfigError(f"taps: a dict must have the keys 'student' and 'teacher', not {sorted(taps)}")
            return cls(_names(taps['student']), _names(taps['teacher']))
        return cls(_names(taps), _names(taps))


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(f"taps: needs names such as 'neck' or ['backbone:2', 'backbone:3'], not {list(names)!r}")
    return names


class Distiller(nn.Module):
    """A distillation method: what it taps, how it aligns, what it minimises.

    A subclass sets :attr:`taps` in its constructor, builds connectors in :meth:`setup`, and computes losses in
    :meth:`forward`. It sees tensors and a :class:`~kd_dense.context.Context` only, so the same object works in every
    toolbox.

    Attributes:
        taps: role -> :class:`TapPair`. The roles are the keys of what :meth:`forward` is given.
        default_loss_weight: used when the config gives no ``loss_weight``.
        matches_levels: give it, of the teacher's levels, those that have the strides of the student's; see
            :func:`matched_levels`.
        needs_boxes: without any ground-truth box in a batch there is nothing to compare: its losses may be 0 then, and
            neither that they are not nor an ``auto`` weight is found out on such a batch.
        probabilities_only: it compares class logits of both sides and nothing else, and of the teacher's it reads only
            the probabilities that they stand for, so that log-probabilities of a softmax head do as well, and a cache
            may keep a part of them.
    """

    taps: dict[str, TapPair]
    default_loss_weight: float | str | Mapping = 1.0
    matches_levels: bool = True
    needs_boxes: bool = False
    probabilities_only: bool = False

    def setup(self, student: Probe, teacher: Probe) -> None:
        """Told once, before training, what shapes to expect; builds whatever depends on them.

        Raises:
            ConfigError: shapes that this method can not bring together.
        """

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        """Role -> tensors of both sides, in; name -> scalar loss, out, before the loss weight.

        The teacher's tensors carry no gradient. Every value is added to the task loss, and has ``loss`` in its name.
        """
        raise NotImplementedError

    def view(self, images: Tensor, context: Context) -> Tensor:
        """What the student sees in this step instead of ``images`` ``[B, C, H, W]``; the teacher sees ``images``.

        Must leave ``images`` as they are and every object where it is: labels and boxes stay the same. There is one
        forward of the student, for the task and for all distillers, so batch norm sees each image once.
        """
        return images

    def after_step(self, lr: float) -> None:
        """Called when the host's optimizer has stepped, with the learning rate of that step.

        The place to train what the distiller owns but the host does not train, see
        :class:`~kd_dense.side_trained.SideTrained`.
        """

    def compared_nothing(self) -> Tensor | None:
        """Boolean scalar: did the last forward find nothing to compare, so that its losses are 0 for a good reason?

        For methods that look for more than a box, as :attr:`needs_boxes` does; asked like it. ``None``: they are not.
        """
        return None

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters that took no part in the last forward because of what the batch was.

        They are excused from the check that every connector gets a gradient in the first step; in distributed training
        they are given one of 0. A connector that chooses among branches has a method of this name.
        """
        choosing = (m for m in self.modules() if m is not self and hasattr(m, 'idle_parameters'))
        return [p for m in choosing for p in m.idle_parameters()]


def paired_shapes(student: Probe, teacher: Probe, role: str) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of both sides under ``role``, level by level.

    Raises:
        ConfigError: different numbers of levels, or a level of a stride that the other side has in another place.
    """
    s, t = student.shapes[role], teacher.shapes[role]
    ours, theirs = octaves(student, role), octaves(teacher, role)
    # Levels of strides that the other side has not at all are meant as they are written, and resized.
    misplaced = any(a != b and a in theirs for a, b in zip(ours, theirs, strict=False))
    if len(s) != len(t) or misplaced:
        raise ConfigError(
            f'taps: the student gives {len(s)} tensors ({describe(student, role)}) but the teacher {len(t)} '
            f'({describe(teacher, role)}){_unmatched(ours, theirs)}; choose levels of equal stride on both sides, for '
            "example with dict(student=['NAME:INDEX', ...], teacher=...)"
        )
    return list(zip(s, t, strict=True))


def matched_levels(student: Probe, teacher: Probe, role: str) -> list[int] | None:
    """Which of the teacher's levels goes with each of the student's: the one of equal stride.

    Strides count as equal when they round to the same power of two: the coarse levels of a pyramid are rounded up to
    whole cells, so that stride 128 may be measured as 107.

    Returns:
        For each level of the student an index into the teacher's, if each has exactly one and that changes anything;
        else ``None``: the levels go together as they are written, and :func:`paired_shapes` says what does not fit.
    """
    ours, theirs = octaves(student, role), octaves(teacher, role)
    repeated = len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs)
    if not ours or not theirs or ours == theirs or repeated or not set(ours) <= set(theirs):
        return None
    return [theirs.index(octave) for octave in ours]


def octaves(probe: Probe, role: str) -> list[int]:
    """Base-2 logarithms of the strides under ``role``, rounded; empty when not all of the tensors are maps."""
    strides = probe.strides(role)
    return [round(math.log2(stride)) for stride in strides] if all(strides) else []


def _unmatched(ours: list[int], theirs: list[int]) -> str:
    lacking = [2**octave for octave in ours if octave not in theirs]
    return f', and nothing of the teacher has stride {", ".join(map(str, lacking))}' if theirs and lacking else ''


def score_branches(teacher: Probe, method: str, instead: str) -> list[list[int]]:
    """For each of the teacher's levels under ``features``: the indices of the logits under ``scores`` that are of it.

    One for each branch of the head; told by their size, as the levels may be fewer than the head has.

    Args:
        method, instead: who asks, and what to use where there are no such logits; named in errors.

    Raises:
        ConfigError: no dense sigmoid head, or logits that are of none of the levels.
    """
    if isinstance(teacher.logits, str):
        raise ConfigError(f"{method} can not read the teacher's class scores: {teacher.logits}")
    if teacher.logits.activation != 'sigmoid' or teacher.logits.layout != 'map':
        raise ConfigError(f'{method} needs a teacher with a dense sigmoid head; use {instead} instead')
    sizes = [shape[2:] for shape in teacher.shapes['features']]
    given = [shape[2:] for shape in teacher.shapes['scores']]
    if len(set(sizes)) < len(sizes):  # the coarsest levels of a small probe may be of one size
        if len(given) % len(sizes):
            raise ConfigError(f'taps: the teacher has class logits on {len(given)} levels and features on {len(sizes)}')
        return [list(range(i, len(given), len(sizes))) for i in range(len(sizes))]
    found = [[i for i, other in enumerate(given) if other == size] for size in sizes]
    if not all(found):
        raise ConfigError(
            f"taps: the teacher's class logits ({describe(teacher, 'scores')}) are not those of all of its features "
            f'({describe(teacher, "features")}); tap the levels that feed its head'
        )
    return found


def describe(probe: Probe, role: str) -> str:
    """``backbone:3 [B, 256, 16, 16] stride 32, ...``"""
    parts = []
    for shape, stride in zip(probe.shapes[role], probe.strides(role), strict=True):
        text = '[' + ', '.join(['B', *map(str, shape[1:])]) + ']'
        parts.append(text + (f' stride {stride:g}' if stride else ''))
    return f'{", ".join(probe.names[role])}: {"; ".join(parts)}'
