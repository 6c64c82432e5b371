"""Random states of Python, NumPy and torch: keep them, put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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
