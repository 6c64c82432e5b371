"""Keeps what MMEngine logs of an iteration on the device until somebody reads it.

MMEngine's ``RuntimeInfoHook`` copies every loss to the host in every iteration, and its optimizer wrapper the norm of
the gradients. Each copy waits until the device has done everything before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import Runner
from torch import Tensor

from kd_dense.registry import HOOKS

#: Rows after which they are fetched even if nobody reads them, so that memory stays bounded: one or two an iteration.
LIMIT = 1000


class DeferredLog:
    """Numbers on the device that are on their way into MMEngine's log.

    The numbers that are added together become one row on the device; :meth:`fetch` copies all rows to the host at once
    (one copy for each device and type of number, which is one copy in practice).
    """

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, tuple[DeferredBuffer, ...]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, hub: MessageHub, values: Mapping[str, Any]) -> None:
        """As ``hub.update_scalar(key, value)`` of each of ``values``, without reading those that are tensors.

        The first value of a key is read: ``hub`` makes its own entry of it, which is then replaced by one that waits.

        Raises:
            AssertionError: by MMEngine, of a tensor of several numbers.
        """
        rows = defaultdict(list)
        for key, value in values.items():
            if key not in hub.log_scalars or not isinstance(value, Tensor) or value.numel() != 1:
                hub.update_scalar(key, value)
                continue
            buffer = hub.log_scalars[key]
            if not isinstance(buffer, DeferredBuffer):
                buffer = hub.log_scalars[key] = DeferredBuffer(buffer, self)
            rows[value.device, value.dtype].append((buffer, value.detach().reshape(())))
        for row in rows.values():
            buffers, numbers = zip(*row, strict=True)
            self._rows.append((torch.stack(numbers), buffers))  # a copy: whoever made the numbers may use them again
        if len(self._rows) >= LIMIT:
            self.fetch()

    def fetch(self) -> None:
        """Bring all numbers to the host, into the entries that they belong to, in the order in which they came."""
        rows, self._rows = self._rows, []
        groups = defaultdict(list)
        for row, _ in rows:
            groups[row.device, row.dtype].append(row)
        numbers = {key: iter(torch.cat(group).tolist()) for key, group in groups.items()}
        for row, buffers in rows:
            for buffer in buffers:
                buffer.update(next(numbers[row.device, row.dtype]))


class _Complete:
    """An attribute of a :class:`DeferredBuffer` that is complete whenever it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, buffer: DeferredBuffer, owner: type | None = None) -> Any:
        buffer.log.fetch()
        return vars(buffer)[self._name]

    def __set__(self, buffer: DeferredBuffer, value: Any) -> None:
        vars(buffer)[self._name] = value


class DeferredBuffer(HistoryBuffer):
    """An entry of MMEngine's log whose last values may still be on the device; reading anything of it fetches them.

    Copies and pickles are MMEngine's own buffers: a checkpoint is read where there is no kd_dense.

    Args:
        buffer: the entry so far.
        log: where its values wait.
    """

    _log_history = _Complete()
    _count_history = _Complete()

    def __init__(self, buffer: HistoryBuffer, log: DeferredLog) -> None:
        self.log = log
        super().__init__(*buffer.data, buffer.max_length)

    @property
    def waits(self) -> bool:
        """Are there values in the log that are still on the device? Asking does not fetch them."""
        return len(self.log) > 0

    def __reduce__(self) -> tuple:
        return HistoryBuffer, (*self.data, self.max_length)


@HOOKS.register_module()
class DeferredLogHook(RuntimeInfoHook):
    """MMEngine's ``RuntimeInfoHook``, whose losses stay on the device until somebody reads the log.

    That is when a line is logged, when a checkpoint is saved (the log goes into it), and at the end of an epoch and of
    the training: then the losses of all iterations since are copied to the host together. So is the norm of the
    gradients, with ``optim_wrapper.clip_grad``. What is read, and what a resumed run finds, are the same numbers.
    """

    def __init__(self) -> None:
        self.log = DeferredLog()

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        wrapper = runner.optim_wrapper
        for one in wrapper.values() if hasattr(wrapper, 'values') else [wrapper]:
            clip = getattr(one, 'clip_func', None)
            if clip is not None and not isinstance(clip, _Clip):
                one.clip_func = _Clip(clip, one.grad_name, one.message_hub, self.log)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        self.log.add(runner.message_hub, {f'train/{key}': value for key, value in (outputs or {}).items()})

    def after_train_epoch(self, runner: Runner) -> None:
        self.log.fetch()


class _Clip:
    """A function that clips gradients and logs what it returns; to MMEngine, which would read it, it returns nothing.

    Args:
        clip: such as ``clip_grad_norm_``.
        name: of what it returns, in the log.
    """

    def __init__(self, clip: Callable, name: str, hub: MessageHub, log: DeferredLog) -> None:
        self._clip, self._name, self._hub, self._log = clip, name, hub, log

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        norm = self._clip(*args, **kwargs)
        if norm is not None:
            self._log.add(self._hub, {f'train/{self._name}': norm})


def defer_log(runner: Runner) -> None:
    """Put :class:`DeferredLogHook` in the place of MMEngine's own hook; one of another class stays."""
    for i, hook in enumerate(runner.hooks):
        if type(hook) is RuntimeInfoHook:
            deferred = DeferredLogHook()
            vars(deferred).update(vars(hook))  # it may have begun the run
            runner.hooks[i] = deferred
