"""Look over the shoulder of distillers during a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kd_dense.distillation import Distillers


@dataclass
class Seen:
    """One forward of one distiller.

    Args:
        student: the student's tensors that it was given.
        loss: sum of its losses before the loss weight; with its graph.
        inside: what the context in which it ran gave.
    """

    student: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None
    inside: Any = None


Inside = Callable[[str, list[Tensor]], AbstractContextManager]


@contextmanager
def watch(distillers: Distillers, inside: Inside = lambda name, tensors: nullcontext()) -> Iterator[dict[str, Seen]]:
    """Gives distiller name -> :class:`Seen` for the distillers that run in the ``with`` block.

    Args:
        inside: distiller name and its student tensors -> a context in which its forward runs (a clock, say).
    """
    seen: dict[str, Seen] = {}
    open_contexts: dict[str, AbstractContextManager] = {}
    handles = []

    def before(name: str) -> Callable:
        def hook(module: Any, arguments: tuple) -> None:
            tensors = [x for values in arguments[0].values() for x in values]
            seen[name] = Seen(tensors)
            open_contexts[name] = inside(name, tensors)
            seen[name].inside = open_contexts[name].__enter__()

        return hook

    def after(name: str) -> Callable:
        def hook(module: Any, arguments: tuple, losses: dict[str, Tensor]) -> None:
            open_contexts.pop(name).__exit__(None, None, None)
            seen[name].loss = sum(losses.values())

        return hook

    for name, method in distillers.methods.items():
        handles += [method.register_forward_pre_hook(before(name)), method.register_forward_hook(after(name))]
    try:
        yield seen
    finally:
        for context in open_contexts.values():  # a distiller that raised
            context.__exit__(None, None, None)
        for handle in handles:
            handle.remove()


@contextmanager
def at_full_strength(distillers: Distillers) -> Iterator[None]:
    """Every distiller takes part with its full loss weight, wherever its schedule begins or ends."""
    weights = list(distillers.weights.values())
    for weight in weights:
        weight.schedule = lambda progress: 1.0
    try:
        yield
    finally:
        for weight in weights:
            del weight.schedule
