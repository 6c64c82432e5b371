"""Fold batch norms into the convolutions before them, where a forward shows that this changes nothing.

The order in which modules are registered says little about the order in which they run, so nothing is guessed from it:
one forward is watched. A pair is folded when the norm got just what the convolution gave, whenever either of them ran,
and nobody else looked at it: no other operation, and no module whose output is handed on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

#: Forwards that do what their class says; a class with another one (weight standardisation, say) is left alone.
_CONVOLVES = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_NORMALISES = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class Watch:
    """Watches forwards of one model for what can be folded.

    Args:
        model: in evaluation mode.
        kept: modules whose outputs must stay what they are.
    """

    def __init__(self, model: nn.Module, kept: Iterable[nn.Module] = ()) -> None:
        self.model = model
        self._kept = list(kept)
        self._convolutions = [m for m in model.modules() if _is_plain_convolution(m)]
        self._norms = [m for m in model.modules() if _is_plain_norm(m)]
        self._made_by = WeakTensorKeyDictionary()  # outputs of convolutions that are still alive
        self._runs: Counter[nn.Module] = Counter()
        self._pairs: Counter[tuple[nn.Module, nn.Module]] = Counter()
        self._seen: set[nn.Module] = set()  # convolutions whose output somebody other than a norm has seen
        self._norm: nn.Module | None = None  # the one that is running

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Watch the forward inside the ``with`` block."""
        handles = []
        for modules, before, after in (
            (self._convolutions, None, self._convolved),
            (self._norms, self._normalises, self._normalised),
            (self._kept, None, self._handed_on),
        ):
            for module in modules:
                if before is not None:
                    handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after))
        try:
            with _Uses(self._used):
                yield
        finally:
            self._norm = None
            for handle in handles:
                handle.remove()

    def _convolved(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._runs[module] += 1
        self._made_by[output] = module

    def _normalises(self, module: nn.Module, inputs: tuple) -> None:
        self._runs[module] += 1
        self._norm = module
        maker = self._made_by.get(inputs[0]) if inputs else None
        if maker is not None:
            self._pairs[maker, module] += 1

    def _normalised(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._norm = None

    def _handed_on(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        for tensor in torch.utils._pytree.tree_leaves(output):
            self._see(tensor)

    def _used(self, tensor: Any) -> None:
        if self._norm is None:
            self._see(tensor)

    def _see(self, tensor: Any) -> None:
        maker = self._made_by.get(tensor) if isinstance(tensor, Tensor) else None
        if maker is not None:
            self._seen.add(maker)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolutions and the norms that can be folded into them."""
        return [
            (convolution, norm)
            for (convolution, norm), count in self._pairs.items()
            if convolution not in self._seen and count == self._runs[convolution] == self._runs[norm]
        ]

    def fold(self) -> tuple[int, int]:
        """Fold them, for good.

        Returns:
            How many norms were folded, and how many ran.
        """
        pairs = self.pairs()
        for convolution, norm in pairs:
            _fold(convolution, norm)
        return len(pairs), sum(self._runs[norm] > 0 for norm in self._norms)


class _Uses(TorchDispatchMode):
    """Tells ``used`` of every tensor that an operation reads."""

    def __init__(self, used: Callable[[Any], None]) -> None:
        super().__init__()
        self.used = used

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            self.used(value)
        return func(*args, **(kwargs or {}))


def _is_plain_convolution(module: nn.Module) -> bool:
    # a weight that is computed from others (weight norm, pruning) is no parameter of its own
    return type(module).forward in _CONVOLVES and 'weight' in module._parameters and _is_plain(module)


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module).forward in _NORMALISES and module.running_var is not None and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Does nothing else take part in a call: no hook, and no other forward, which a norm folded before has too?"""
    return not (module._forward_hooks or module._forward_pre_hooks or 'forward' in module.__dict__)


@torch.no_grad()
def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    """``norm(convolution(x))`` becomes ``convolution(x)``, and ``norm`` hands on what it gets."""
    weight = convolution.weight
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    wide = [x.cpu().double() if isinstance(x, Tensor) else x for x in (weight, convolution.bias, *statistics)]
    for name, value in zip(('weight', 'bias'), fuse_conv_bn_weights(*wide), strict=True):
        setattr(convolution, name, nn.Parameter(value.to(weight), requires_grad=False))
    # Whoever copies the model and folds by himself, as Ultralytics' validator does, finds a norm that does nothing.
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.affine:
        norm.weight.fill_(1)
        norm.bias.zero_()
    norm.forward = _hand_on


def _hand_on(x: Tensor) -> Tensor:
    return x
