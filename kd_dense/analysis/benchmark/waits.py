"""Operations that make the host wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Those that read a number, or whose result has a size that depends on values.
_NAMES = {
    *('_local_scalar_dense', 'item', 'equal', 'is_nonzero', 'nonzero', 'masked_select', 'bincount', 'histc'),
    *('_unique', '_unique2', 'unique_dim', 'unique_consecutive'),
}


class Waits(TorchDispatchMode):
    """``with Waits(device) as waits: ...`` counts, by name, what made the host wait in forward and backward.

    On a CPU nothing waits; counted is what would on a GPU, as far as it shows there: copies from one device to the
    other do not. What compiled operators do inside of themselves is not seen.

    Args:
        device: of the model. On a GPU, operations on tensors of the host (the step count of an optimizer, say) do not
            count.

    Attributes:
        counts: name of the operation -> how often.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type == self.device.type for x in tensors) and _waits(name, args, kwargs):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _waits(name: str, args: tuple, kwargs: dict) -> bool:
    if name in _NAMES:
        return True
    if name.startswith('index') and len(args) > 1 and isinstance(args[1], (list, tuple)):
        masks = [i for i in args[1] if getattr(i, 'dtype', None) in (torch.bool, torch.uint8)]
        # an index by a mask calls nonzero inside of the kernel, unless one number is written under it
        return bool(masks) and not (name.startswith('index_put') and len(masks) == 1 and _is_number(args[2]))
    if name == 'repeat_interleave':  # repeats in a tensor: the size of the result is their sum
        return kwargs.get('output_size') is None
    if name == '_to_copy':
        return _leaves(args[0].device, kwargs.get('device'))
    if name == 'copy_':
        return isinstance(args[1], Tensor) and _leaves(args[1].device, args[0].device)
    return False


def _is_number(x: Tensor) -> bool:
    return x.numel() == 1 and x.device.type == 'cpu'


def _leaves(source: torch.device, target: torch.device | str | None) -> bool:
    return target is not None and source.type != 'cpu' and torch.device(target).type == 'cpu'
