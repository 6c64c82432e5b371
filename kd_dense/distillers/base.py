"""The interface of a distiller."""

from __future__ import annotations

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
    """

    taps: dict[str, TapPair]
    default_loss_weight: float | str | Mapping = 1.0

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
        ConfigError: different numbers of levels.
    """
    s, t = student.shapes[role], teacher.shapes[role]
    if len(s) != len(t):
        raise ConfigError(
            f'taps: the student gives {len(s)} tensors ({describe(student, role)}) but the teacher {len(t)} '
            f'({describe(teacher, role)}); choose levels of equal stride on both sides, for example with NAME:INDEX'
        )
    return list(zip(s, t, strict=True))


def describe(probe: Probe, role: str) -> str:
    """``backbone:3 [B, 256, 16, 16] stride 32, ...``"""
    parts = []
    for shape, stride in zip(probe.shapes[role], probe.strides(role), strict=True):
        text = '[' + ', '.join(['B', *map(str, shape[1:])]) + ']'
        parts.append(text + (f' stride {stride:g}' if stride else ''))
    return f'{", ".join(probe.names[role])}: {"; ".join(parts)}'
