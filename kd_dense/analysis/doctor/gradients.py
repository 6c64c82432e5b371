"""How hard does each distiller pull, compared with the task, and on what?

The gradients of the task loss and of every weighted distillation term are taken one by one from the graph of the same
training step. Two shares are reported:

* ``share``: ``|grad of the term| / |grad of the task|`` over the student's parameters that the term reaches, which is
  what the optimizer sees. Layers after the tap, which the term does not touch, do not count.
* ``share_at_taps``: the same at the tapped tensors themselves, which is what ``loss_weight='auto'`` sets.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kd_dense.analysis.doctor.toolbox import Toolbox
from kd_dense.analysis.doctor.watch import Seen, at_full_strength, watch
from kd_dense.analysis.doctor.weights import sleeping
from kd_dense.distillation import Distillers, before_clone, dead_connectors, squared_gradients, without_gradient

#: Shares of the task gradient outside of which a term is remarkable.
LOW, HIGH = 0.01, 2.0


@dataclass
class Term:
    """One distillation term over the iterations.

    Args:
        weight: its loss weight at full strength; calibrated in the first iteration where it is ``'auto'``.
        auto: was it calibrated?
        loss: weighted value per iteration.
        share, share_at_taps: see the module; per iteration, ``None`` where the task has no gradient there.
        layers: layer of the student -> share there, of the last iteration; 0 where the term does not reach,
            ``None`` where only the term does.
        connectors: parameter name -> largest gradient norm seen.
    """

    weight: float
    auto: bool
    loss: list[float] = field(default_factory=list)
    share: list[float | None] = field(default_factory=list)
    share_at_taps: list[float | None] = field(default_factory=list)
    layers: dict[str, float | None] = field(default_factory=dict)
    connectors: dict[str, float] = field(default_factory=dict)

    @property
    def median_share(self) -> float | None:
        """Median of the shares that are known."""
        return _median(self.share)

    @property
    def reaches(self) -> list[str]:
        """Layers of the student that receive a gradient from this term."""
        return [name for name, share in self.layers.items() if share is None or share > 0]

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {
            'weight': self.weight,
            'auto': self.auto,
            'loss': self.loss,
            'share': self.share,
            'share_median': self.median_share,
            'share_at_taps': self.share_at_taps,
            'share_at_taps_median': _median(self.share_at_taps),
            'layers': self.layers,
            'reaches': self.reaches,
            'connectors': self.connectors,
            'connectors_without_gradient': dead_connectors(self.connectors),
        }


@dataclass
class Gradients:
    """What a few training steps gave: the task loss per iteration, the active terms, and the names of the others."""

    task: list[float] = field(default_factory=list)
    terms: dict[str, Term] = field(default_factory=dict)
    asleep: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {
            'iterations': len(self.task),
            'task_loss': self.task,
            'terms': {name: term.facts() for name, term in self.terms.items()},
            'weight_0': self.asleep,
        }


def measure(toolbox: Toolbox, student: nn.Module, distillers: Distillers, iterations: int) -> Gradients:
    """Run training steps without an optimizer and take the gradients apart.

    Schedules of loss weights are left aside: every term is measured at its full strength.

    Args:
        student: whose parameters count.
    """
    found = Gradients(asleep=sleeping(distillers))
    with at_full_strength(distillers):
        for batch in toolbox.batches(iterations):
            with watch(distillers) as seen, toolbox.precision():
                task = toolbox.step(batch)
            found.task.append(float(task.detach()))
            _take_apart(found, task, seen, student, distillers)
            del task, seen
    return found


def _take_apart(
    found: Gradients, task: Tensor, seen: Mapping[str, Seen], student: nn.Module, distillers: Distillers
) -> None:
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    layers = layer_names(parameters)
    tapped = {name: [before_clone(x) for x in one.student if x.requires_grad] for name, one in seen.items()}
    at = list(dict.fromkeys(x for tensors in tapped.values() for x in tensors))
    of_task = squared_gradients(task, [*parameters.values(), *at])
    task_squares = dict(zip(parameters, of_task[: len(parameters)], strict=True))
    task_at = dict(zip(at, of_task[len(parameters) :], strict=True))
    for name, one in seen.items():
        weight = distillers.weights[name]
        term = found.terms.setdefault(name, Term(weight.full_strength, weight.auto))
        loss = one.loss * weight.full_strength
        term.loss.append(float(loss.detach()))
        method = distillers.methods[name]
        idle = {id(p) for p in method.idle_parameters()}
        own = {k: p for k, p in method.named_parameters() if p.requires_grad and id(p) not in idle}
        if not loss.requires_grad:
            squares: list[Tensor | None] = [None] * (len(parameters) + len(tapped[name]) + len(own))
        else:
            squares = squared_gradients(loss, [*parameters.values(), *tapped[name], *own.values()])
        of_parameters = dict(zip(parameters, squares, strict=False))
        of_taps = squares[len(parameters) : len(parameters) + len(tapped[name])]
        of_own = squares[len(parameters) + len(tapped[name]) :]
        reached = [k for k, s in of_parameters.items() if s is not None and float(s) != 0]
        term.share.append(_ratio((of_parameters[k] for k in reached), (task_squares[k] for k in reached)))
        term.share_at_taps.append(_ratio(of_taps, (task_at[x] for x in tapped[name])))
        term.layers = {
            layer: _ratio((of_parameters[k] for k in members), (task_squares[k] for k in members))
            for layer, members in layers.items()
        }
        for key, square in zip(own, of_own, strict=True):
            norm = 0.0 if square is None else math.sqrt(float(square))
            term.connectors[key] = max(term.connectors.get(key, 0.0), norm)


def layer_names(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Top-level module -> its parameters; one level deeper where a single module holds everything (``model.0`` ...)."""
    names = list(parameters)
    depth = 1 if len({name.split('.')[0] for name in names}) > 1 else 2
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault('.'.join(name.split('.')[:depth]), []).append(name)
    return layers


def judge(found: Gradients, low: float = LOW, high: float = HIGH) -> tuple[list[str], list[str]]:
    """Failures and warnings about measured gradients.

    Args:
        low, high: shares of the task gradient outside of which a term is remarkable.
    """
    failures, warnings = [], []
    for i, value in enumerate(found.task, 1):
        if not math.isfinite(value):
            failures.append(
                f'the loss of the task is {value} in iteration {i}; check the data and the learning rate warm-up with '
                'tools/train.py --student-alone'
            )
            break
    for name, term in found.terms.items():
        failure = _failure(name, term)
        if failure is not None:
            failures.append(failure)
        elif term.median_share is None:
            warnings.append(f'distillers.{name}: reaches only layers in which the task loss has no gradient')
        elif term.median_share < low:
            warnings.append(
                f'distillers.{name}.loss_weight: its gradient is {_percent(term.median_share)} of that of the task, so '
                f'it hardly changes the training; raise the weight (now {term.weight:.3g}), or use {AUTO}'
            )
        elif term.median_share > high:
            warnings.append(
                f'distillers.{name}.loss_weight: its gradient is {_percent(term.median_share)} of that of the task '
                'before training, which it may drown; compare with a lower weight '
                f'(now {term.weight:.3g}), or use {AUTO}'
            )
    return failures, warnings


AUTO = "loss_weight=dict(type='auto', share=0.1)"


def _failure(name: str, term: Term) -> str | None:
    bad = next((v for v in term.loss if not math.isfinite(v)), None)
    if bad is not None:
        return f'distillers.{name}: its loss is {bad}; check the taps, the teacher and the mask'
    if not any(term.loss):
        return f'distillers.{name}: its loss is 0 in every iteration; check the taps, the teacher and the mask'
    dead = dead_connectors(term.connectors)
    if dead:
        return without_gradient(name, dead)
    if not term.reaches:
        return (
            f'distillers.{name}: no parameter of the student receives a gradient from it; tap a layer that is trained'
        )
    return None


def _ratio(of_term: Iterable[Tensor | None], of_task: Iterable[Tensor | None]) -> float | None:
    own, task = (math.sqrt(sum(float(s) for s in squares if s is not None)) for squares in (of_term, of_task))
    if own == 0:
        return 0.0
    return own / task if task > 0 else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _percent(share: float) -> str:
    return f'{100 * share:.2g} %' if share < 1 else f'{100 * share:,.0f} %'
