"""Time and memory of student, teacher and every distillation term.

Times are medians over the iterations: wall time on a CPU, events on a GPU. The memory of a part is what can be measured
without disturbing it: on a GPU the peak of what it allocates; on a CPU the bytes that it keeps for the backward (of the
teacher, which keeps nothing, its weights).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.analysis.doctor.toolbox import Toolbox
from kd_dense.analysis.doctor.watch import at_full_strength, watch
from kd_dense.distillation import Distillers


@dataclass(frozen=True)
class Part:
    """What one part of a training step costs: ``milliseconds`` (median), and ``memory`` in bytes."""

    milliseconds: float
    memory: int


@dataclass(frozen=True)
class Cost:
    """Costs of a training step.

    Args:
        student: forward and backward of the student alone.
        teacher: forward, to its deepest tap.
        terms: distiller name -> its own forward and backward, between taps and loss.
        step: everything together, in one step.
        memory_kind: what ``memory`` means on this device.
    """

    student: Part
    teacher: Part
    terms: dict[str, Part]
    step: Part
    memory_kind: str

    @property
    def ratio(self) -> float:
        """Time of a step over that of student and teacher, which nothing can do without."""
        return self.step.milliseconds / (self.student.milliseconds + self.teacher.milliseconds)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        parts = {'student': self.student, 'teacher': self.teacher, 'step': self.step}
        rows = {name: vars(part) for name, part in parts.items()}
        return rows | {
            'terms': {name: vars(part) for name, part in self.terms.items()},
            'ratio': self.ratio,
            'memory_kind': self.memory_kind,
        }


def measure(toolbox: Toolbox, student: nn.Module, teacher: nn.Module, distillers: Distillers, iterations: int) -> Cost:
    """Time the parts of a training step on one batch, after a warm-up."""
    batch = next(iter(toolbox.batches(1)))
    device = toolbox.device
    trained = [p for module in (student, distillers) for p in module.parameters() if p.requires_grad]

    def student_step() -> None:
        with toolbox.precision():
            loss = toolbox.student_step(batch)
        _backward(loss, trained)

    def teacher_step() -> None:
        with toolbox.precision():
            toolbox.teacher_step(batch)

    def whole_step() -> None:
        with watch(distillers) as seen, toolbox.precision():
            task = toolbox.step(batch)
        terms = [one.loss * distillers.weights[name].full_strength for name, one in seen.items()]
        _backward(task + sum(terms), trained)

    with at_full_strength(distillers):
        whole_step()  # warm-up, and the calibration of 'auto' weights
        times: dict[str, list[float]] = {'student': [], 'teacher': [], 'step': []}
        forward: dict[str, list[float]] = {}
        backward: dict[str, list[float]] = {}
        for _ in range(max(iterations, 1)):
            for name, function in (('student', student_step), ('teacher', teacher_step), ('step', whole_step)):
                times[name].append(_seconds(function, device))
            _time_terms(toolbox, batch, distillers, forward, backward)
        on_gpu = device.type == 'cuda'
        if on_gpu:
            memory = {
                name: _peak(function, device)
                for name, function in (('student', student_step), ('teacher', teacher_step), ('step', whole_step))
            }
        else:
            memory = {'student': _kept(lambda: toolbox.student_step(batch), student), 'teacher': _weights(teacher)}
        terms, kept_by_step = _term_memory(toolbox, batch, distillers, student, on_gpu)
        memory.setdefault('step', kept_by_step)
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return Cost(
        **{name: Part(milliseconds[name], memory[name]) for name in ('student', 'teacher', 'step')},
        terms={
            name: Part(1e3 * (statistics.median(forward[name]) + statistics.median(backward[name])), terms[name])
            for name in forward
        },
        memory_kind='peak of the allocated memory' if on_gpu else 'kept for the backward (teacher: its weights)',
    )


def _backward(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    torch.autograd.grad(loss, parameters, allow_unused=True)  # leaves no gradients behind


# -- time --------------------------------------------------------------------------------------------------------------


@contextmanager
def stopwatch(device: torch.device) -> Iterator[Callable[[], float]]:
    """Times the ``with`` block; what it gives tells the seconds afterwards."""
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        yield seconds
        end.record()
    else:
        clock = [time.perf_counter(), 0.0]
        yield lambda: clock[1] - clock[0]
        clock[1] = time.perf_counter()


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    with stopwatch(device) as seconds:
        function()
    return seconds()


def _time_terms(
    toolbox: Toolbox,
    batch: Any,
    distillers: Distillers,
    forward: dict[str, list[float]],
    backward: dict[str, list[float]],
) -> None:
    with watch(distillers, lambda name, tensors: stopwatch(toolbox.device)) as seen, toolbox.precision():
        toolbox.step(batch)
    for name, one in seen.items():
        own = [p for p in distillers.methods[name].parameters() if p.requires_grad]
        at = [*(x for x in one.student if x.requires_grad), *own]
        forward.setdefault(name, []).append(one.inside())
        seconds = 0.0
        if one.loss.requires_grad and at:
            with stopwatch(toolbox.device) as clock:
                torch.autograd.grad(one.loss, at, retain_graph=True, allow_unused=True)
            seconds = clock()
        backward.setdefault(name, []).append(seconds)


# -- memory ------------------------------------------------------------------------------------------------------------


def _peak(function: Callable[[], None], device: torch.device) -> int:
    with allocation(device) as peak:
        function()
    return peak()


@contextmanager
def allocation(device: torch.device) -> Iterator[Callable[[], int]]:
    """The peak of what the ``with`` block allocates on a GPU, in bytes, which what it gives tells afterwards."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = [0]
    yield lambda: found[0]
    torch.cuda.synchronize(device)
    found[0] = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def kept_for_backward(except_for: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Bytes of the tensors that autograd keeps for what runs in the ``with`` block, each storage once.

    Args:
        except_for: tensors that are there anyway, such as parameters.
    """
    known = {x.untyped_storage().data_ptr() for x in except_for}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield lambda: sum(kept.values())


def _kept(function: Callable[[], Tensor], model: nn.Module) -> int:
    with kept_for_backward([*model.parameters(), *model.buffers()]) as kept:
        loss = function()
    del loss
    return kept()


def _weights(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def _term_memory(
    toolbox: Toolbox, batch: Any, distillers: Distillers, student: nn.Module, on_gpu: bool
) -> tuple[dict[str, int], int]:
    """Bytes of every term, and of the whole step on a CPU."""
    weights = [x for model in (student, distillers) for x in (*model.parameters(), *model.buffers())]
    if on_gpu:
        with watch(distillers, lambda name, tensors: allocation(toolbox.device)) as seen, toolbox.precision():
            toolbox.step(batch)
        return {name: one.inside() for name, one in seen.items()}, 0
    with watch(distillers, lambda name, tensors: kept_for_backward([*weights, *tensors])) as seen:
        toolbox.step(batch)
    with kept_for_backward(weights) as whole:
        loss = toolbox.step(batch)
    del loss
    return {name: one.inside() for name, one in seen.items()}, whole()
