"""Counts the operations that make the host wait for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """``with Waits() as waits: ...``; ``waits.seen`` has the names of the operations that waited."""

    NAMES = ('_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'equal', 'is_nonzero')

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith('index') and isinstance(args[1], (list, tuple)) else []
        # an index by a boolean mask calls nonzero inside the kernel
        if name in self.NAMES or any(getattr(i, 'dtype', None) == torch.bool for i in indices):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
