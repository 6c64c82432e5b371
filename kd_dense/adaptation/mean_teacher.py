"""A teacher whose weights are the moving average of the student's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_dense.errors import ConfigError, closest
from kd_dense.teacher import Teacher

Result = TypeVar('Result')

BUFFERS = ('average', 'copy', 'keep')


class MeanTeacher(Teacher):
    """``teacher = d teacher + (1 - d) student`` after every step of the optimizer, from equal weights on.

    Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, section 2. The decay of 0.99
    is that of SSDA-YOLO (Zhou et al., CVIU 229, 2023), in its released code. The warm-up ``d_n = d (1 - exp(-n / w))``
    in the ``n``-th update is the one by which Ultralytics' trainer averages weights (``w = 2000``); SSDA-YOLO has none.

    Like every :class:`~kd_dense.teacher.Teacher` it is no ``nn.Module``: the average is in no optimizer, state dict,
    DDP bucket or copy of its owner, and in evaluation mode whenever it runs. Its owner stores :meth:`state_dict`.

    Averaging costs a few kernels, not some for every tensor, and asks the device for nothing.

    Args:
        student: copied, as it is now; a bare module, not one wrapped for distributed training.
        decay: ``d``, 0 <= d < 1.
        buffers: what an update does with the student's buffers. ``'average'``: those of floating point, such as the
            running statistics of batch norm, as the weights are, and all others copied. ``'copy'``: all copied.
            ``'keep'``: none touched, so that the teacher runs its new weights on the statistics of its first day. That
            is what the released code of SSDA-YOLO does, and what users of it found to ruin the teacher.
        warmup: ``w`` in updates; 0: none.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(self, student: nn.Module, decay: float = 0.99, buffers: str = 'average', warmup: float = 0) -> None:
        if not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise ConfigError(f'mean_teacher.decay: must be a number with 0 <= decay < 1, not {decay!r}')
        if not (isinstance(warmup, (int, float)) and 0 <= warmup < math.inf):
            raise ConfigError(f'mean_teacher.warmup: must be a number of updates >= 0, not {warmup!r}')
        if buffers not in BUFFERS:
            raise ConfigError(f'mean_teacher.buffers: unknown policy {buffers!r}; {closest(str(buffers), BUFFERS)}')
        super().__init__(copy.deepcopy(student))
        self.decay, self.buffers, self.warmup = float(decay), buffers, float(warmup)
        self.updates = 0

    def decay_at(self, update: int) -> float:
        """The decay in the ``update``-th update, counted from 1."""
        return self.decay * (-math.expm1(-update / self.warmup) if self.warmup else 1.0)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards ``student``. To be called once after each step of the optimizer, and not in between.

        With gradients accumulated over ``k`` iterations that is every ``k``-th iteration: the teacher is then the one
        of a batch ``k`` times as large. Several processes have equal parameters, but each its own running statistics;
        the teacher takes their mean, so that it is the same in all of them.
        """
        self.updates += 1
        step = 1 - self.decay_at(self.updates)
        own, new = dict(self.model.named_parameters()), dict(student.named_parameters())
        averaged, copied = [(own[name], p.detach()) for name, p in new.items()], []
        if self.buffers != 'keep':
            own = dict(self.model.named_buffers())
            pairs = [(own[name], b) for name, b in student.named_buffers()]
            floating = _mean_of_processes([(a, b) for a, b in pairs if b.is_floating_point()])
            copied = [(a, b) for a, b in pairs if not b.is_floating_point()]
            if self.buffers == 'average':
                averaged += floating
            else:
                copied += floating
        torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], step)
        if copied:
            torch._foreach_copy_([a for a, _ in copied], [b for _, b in copied])

    @torch.no_grad()
    def run(self, forward: Callable[[nn.Module], Result]) -> Result:
        """``forward(model)`` with the average in evaluation mode and without gradients."""
        return forward(freeze_again(self.model))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, buffers and the number of updates, by name; tensors only."""
        state = {f'model.{name}': tensor for name, tensor in self.model.state_dict().items()}
        return {'updates': torch.tensor(self.updates), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ConfigError: it belongs to another model.
        """
        weights = {name.removeprefix('model.'): t for name, t in state.items() if name.startswith('model.')}
        try:
            self.model.load_state_dict(weights)
            self.updates = int(state['updates'])
        except (RuntimeError, KeyError) as error:
            reason = ' '.join(str(error).split())
            raise ConfigError(f'resume: the mean teacher in the checkpoint is of another model: {reason}') from error

    def reset(self, student: nn.Module) -> None:
        """Begin anew from the weights and buffers that ``student`` has now, after a pretrained file was loaded, say."""
        self.model.load_state_dict(student.state_dict())
        self.updates = 0


def freeze_again(model: nn.Module) -> nn.Module:
    """``model``, in evaluation mode whoever called ``.train()`` on it; costs a glance where it is."""
    return model.eval() if any(m.training for m in model.modules()) else model


def _mean_of_processes(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The second of each pair replaced by its mean over all processes; in one exchange for each type of number."""
    if not pairs or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return pairs
    result = []
    for dtype in dict.fromkeys(b.dtype for _, b in pairs):
        chosen = [(a, b) for a, b in pairs if b.dtype == dtype]
        flat = torch.cat([b.flatten() for _, b in chosen])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([b.numel() for _, b in chosen])
        result += [(a, part.view_as(b)) for (a, b), part in zip(chosen, parts, strict=True)]
    return result
