"""Random states of Python, NumPy and torch: keep them, put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def capture() -> dict[str, Any]:
    """All random states, as nothing but numbers, lists and tensors: torch's weights-only mode loads them."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': [version, list(numbers), gauss],
        'numpy': [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what :func:`capture` returned, on whatever device a checkpoint has been loaded to since."""
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, one in zip(range(devices), state['cuda'], strict=False):
        torch.cuda.set_rng_state(one.cpu(), device)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Whatever is drawn inside, from Python, NumPy or torch, leaves their random states as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        # naming all devices keeps torch from warning that there are several
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def step_seed(seed: int, iteration: int, alike: bool = False) -> int:
    """A seed for what a distiller draws in one step: other numbers in every iteration and in every process.

    It follows from the arguments alone. So a resumed run draws what the uninterrupted one would have drawn, and the
    random numbers of the student (data, augmentation, dropout) are those of a run without the distiller.

    Args:
        seed: of the distiller.
        iteration: see :class:`~kd_dense.context.Context`.
        alike: the same numbers in every process.
    """
    rank = dist.get_rank() if not alike and dist.is_available() and dist.is_initialized() else 0
    return random.Random(f'{seed} {iteration} {rank}').getrandbits(63)
