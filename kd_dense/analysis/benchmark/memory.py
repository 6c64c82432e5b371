"""What a piece of work allocates, and what it keeps for the backward."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch

from kd_dense.analysis.benchmark.bench import Work
from kd_dense.analysis.doctor.cost import allocation, kept_for_backward

#: What ``peak`` means, for the reader of the table.
MEANING = 'largest sum of the memory that torch allocates during a step and has not freed yet'

# Options of glibc's mallopt, see malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep memory that is freed, for this process, instead of giving it back to the system.

    A training reaches a state in which each step takes the memory that the last one left. Pieces that are timed in
    turns do not: what one of them gives back, the next has to be given page by page, and pays for it.

    Returns:
        Could it? Other C libraries, and the memory of a GPU, are left as they are.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, value) == 1 for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)))


def peak(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that ``work`` needs at its peak, on top of what is there before it.

    On a GPU by the counters of the allocator; on a CPU from the events that the profiler gets from it, which include
    what an operation needs for a moment inside of itself (but not what a library allocates past torch).
    """
    if device.type == 'cuda':
        with allocation(device) as found:
            work()
        return found()
    os.environ['KINETO_LOG_LEVEL'] = '99'  # it reports a missing GPU, and every start and stop, past Python
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about events of earlier cycles; there is one
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    return highest(e.nbytes() for e in sorted(events, key=_time))


def highest(changes: Iterable[int]) -> int:
    """The largest sum that a sequence of allocations (positive) and releases (negative) reaches; at least 0."""
    return max(accumulate(changes, initial=0))


def kept(work: Work) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward, weights and buffers not counted."""
    if work.update is None:
        return 0
    weights = [x for module in work.modules for x in (*module.parameters(), *module.buffers())]
    with kept_for_backward(weights) as count:
        loss = work.forward()
    found = count()
    backward(work, loss)  # lets them go
    return found


def backward(work: Work, loss: torch.Tensor) -> None:
    """The backward without the optimizer; the gradients are thrown away."""
    loss.backward()
    for module in work.modules:
        module.zero_grad(set_to_none=True)


def _time(event: object) -> int:
    return event.start_ns() if hasattr(event, 'start_ns') else event.start_us()  # before PyTorch 2.4
