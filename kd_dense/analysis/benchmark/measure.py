"""Time pieces of work in turns, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from kd_dense.analysis.benchmark.bench import Bench, Facts, Work
from kd_dense.analysis.benchmark.memory import backward, kept, peak
from kd_dense.analysis.benchmark.variants import Variant, title_of
from kd_dense.analysis.benchmark.waits import Waits
from kd_dense.analysis.doctor.cost import stopwatch
from kd_dense.errors import ConfigError

#: Runs of every piece before the first that counts: calibrates ``auto`` weights, fills caches.
WARMUP = 2


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation, as NumPy computes them."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(middle, low, high)


@dataclass(frozen=True)
class Measured:
    """What one piece of work costs.

    Args:
        seconds: of every repetition, in order.
        peak: bytes, see :func:`~kd_dense.analysis.benchmark.memory.peak`.
        kept: bytes kept for the backward.
        waits: name of an operation that makes the host wait -> how often in forward and backward.
    """

    seconds: Sequence[float]
    peak: int
    kept: int
    waits: Mapping[str, int] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """Of the seconds."""
        return Spread.of(self.seconds)

    @property
    def wait_count(self) -> int:
        """How often the host waits."""
        return sum(self.waits.values())


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        config: name of the config.
        variant: name of its distillers.
        distillers: themselves.
        facts: about models and batch.
        parts: ``'student'``, ``'teacher'``, ``'step'``, and rivals.
    """

    config: str
    variant: str
    distillers: Mapping[str, Mapping]
    facts: Facts
    parts: Mapping[str, Measured]

    @property
    def bound(self) -> list[float]:
        """Seconds of the student's step and the teacher's forward, which nothing can do without, per repetition."""
        return [a + b for a, b in zip(self.parts['student'].seconds, self.parts['teacher'].seconds, strict=True)]

    @property
    def ratio(self) -> Spread:
        """Time of a step over the bound, taken within each repetition."""
        return _ratio(self.parts['step'].seconds, self.bound)

    def against(self, rival: str) -> Spread | None:
        """Time of a step over that of a rival, taken within each repetition; ``None`` where it was not measured."""
        return _ratio(self.parts['step'].seconds, self.parts[rival].seconds) if rival in self.parts else None

    @property
    def cached(self) -> Spread | None:
        """Time of a step from a teacher cache over that of the student alone; ``None`` where it was not measured."""
        return _ratio(self.parts['cached'].seconds, self.parts['student'].seconds) if 'cached' in self.parts else None


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def benchmark(
    bench: Bench,
    variants: Sequence[Variant],
    against: Sequence[str] = (),
    iterations: int = 10,
    quiet: Callable[[], AbstractContextManager] = nullcontext,
    tick: Callable[[], Any] = lambda: None,
) -> list[Row]:
    """Measure every variant of one config.

    Args:
        bench: the config. Closed at the end.
        variants: what stands in place of its distillers.
        against: rivals to measure too, where the toolbox has them.
        iterations: repetitions that count.
        quiet: a context in which the toolbox works, to silence it.
        tick: called after every repetition, warm-up included.

    Raises:
        ConfigError, DistillationError: what is wrong with the config or with a distiller.
    """
    rows = []
    rivals = [rival for rival in against if rival in bench.rivals and rival != 'student']
    try:
        with quiet():
            facts = bench.prepare()
        for variant in variants:
            distillers = bench.distillers() if variant.distillers is None else variant.distillers
            with quiet(), _large_enough(), bench.variant(distillers, rivals) as works:
                parts = measure(works, bench.device, iterations, tick)
            rows.append(Row(bench.name, variant.name or title_of(distillers), distillers, facts, parts))
            del works  # and with them connectors, optimizers and gradients, before the next ones are made
            gc.collect()
    finally:
        bench.close()
    return rows


def measure(
    works: Mapping[str, Work], device: torch.device, iterations: int, tick: Callable[[], Any] = lambda: None
) -> dict[str, Measured]:
    """Name -> what that piece of work costs; each repetition runs all of them, beginning with another one.

    Raises:
        ConfigError: the batch is too small for the batch norm of a model.
    """
    names = list(works)
    for _ in range(WARMUP):
        for work in works.values():
            with _large_enough():
                work()
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for i in range(iterations):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            with stopwatch(device) as clock:
                works[name]()
            seconds[name].append(clock())
        tick()
    found = {}
    for name, work in works.items():
        waits = _waits(work, device)
        found[name] = Measured(seconds[name], peak(work, device), kept(work), waits)
    return found


@contextmanager
def _large_enough() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        raise ConfigError('--batch: batch norm needs more than one image here; give --batch 2 or more') from None


def _waits(work: Work, device: torch.device) -> dict[str, int]:
    with Waits(device) as waits:
        loss = work.forward()
        if work.update is not None:
            backward(work, loss)
    return dict(waits.counts)
