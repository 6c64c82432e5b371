"""Counts what a piece of code dispatches: all operations, and those that make host and device wait for each other."""

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from tests.helpers.waits import Waits


class Operations(Waits):
    """``with Operations() as operations: ...``, on any device; ``backward()`` inside counts as well.

    Attributes:
        counts: name of every ATen operation -> how often it was dispatched. A loop over boxes shows as a count that
            grows with their number.
        seen: names of the operations that wait for the device: reading a number, a size that depends on values, a copy
            to the host.
        uploads: names of the operations that bring Python numbers in a list to the device, which waits as well.
    """

    NAMES = (*Waits.NAMES, '_unique', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount', 'histc')

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.uploads: list[str] = []

    def __enter__(self) -> 'Operations':
        self._patches = ExitStack()
        for name in ('tolist', 'numpy', 'cpu'):  # of a tensor on the host they dispatch nothing
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._noted(name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def _noted(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            return original(x, *args, **kwargs)

        return method

    @property
    def total(self) -> int:
        """Operations dispatched, those that only view a tensor included."""
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == 'lift_fresh':  # what torch.tensor and as_tensor end with, on whatever device
            self.uploads.append(name)
        if name == 'repeat_interleave' and (kwargs or {}).get('output_size') is None:
            self.seen.append(name)  # repeats in a tensor: the size of the result is read from it
        if name == '_to_copy' and _leaves(args[0], (kwargs or {}).get('device')):
            self.seen.append(f'{name} to {kwargs["device"]}')
        return super().__torch_dispatch__(func, types, args, kwargs)


def _leaves(x: torch.Tensor, device: Any) -> bool:
    return device is not None and torch.device(device).type == 'cpu' and x.device.type != 'cpu'
