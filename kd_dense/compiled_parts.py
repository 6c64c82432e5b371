"""Compile a model part by part, so that nothing of what is watched from outside lies inside of compiled code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kd_dense.taps import replaced_forward


class CompiledParts:
    """The parts of a model between its taps, compiled one by one.

    No part has a tap inside, so what the taps do, and the end of a forward at the deepest of them, stays outside of
    compiled code: the parts behind it neither run nor are compiled.

    Args:
        model: left as it is; compiled forwards are in place inside of :meth:`in_place` only.
        tapped: the modules whose outputs are wanted.
        options: of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, tapped: Iterable[nn.Module], options: Mapping[str, Any]) -> None:
        self.parts = list(dict.fromkeys(_parts(model, set(tapped))))
        self._forwards = [_compiled(i, part.forward, options) for i, part in enumerate(self.parts)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model runs what was compiled."""
        with ExitStack() as stack:
            for part, forward in zip(self.parts, self._forwards, strict=True):
                stack.enter_context(replaced_forward(part, forward))
            yield


def _parts(module: nn.Module, tapped: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules below ``module`` that have submodules, a forward of their own, and no tap inside."""
    for child in module.children():
        inner = list(child.modules())[1:]
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if inner and not is_list and 'forward' not in child.__dict__ and tapped.isdisjoint(inner):
            yield child
        else:
            yield from _parts(child, tapped)


def _compiled(index: int, forward: Callable, options: Mapping[str, Any]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # torch.compile limits the number of graphs of one code object, so each part gets its own.
    run.__code__ = run.__code__.replace(co_name=f'part_{index}')
    return torch.compile(run, **options)
