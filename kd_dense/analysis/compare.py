"""What distillation, or adaptation, gained: its runs and those of its baseline, compared in pairs of equal seed.

A seed fixes initial weights and data order, so the runs of one seed share much of their luck. The difference is
therefore taken within each seed, and its uncertainty is the spread of these differences over seeds (Student's t
interval), which decides whether a gain may be claimed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from kd_dense.analysis.record import RunRecord
from kd_dense.errors import ConfigError

BASELINE = 'student'
LEVEL = 0.95


@dataclass(frozen=True)
class Words:
    """What a report calls the two scores that variants lie between.

    Attributes:
        variant: name of a variant that has none of its own, and of its runs in their records.
        baseline: in tables, legends and above pictures.
        in_sentences: the same within a sentence.
        reference: what else could be reached, of which a variant closes a share of the gap.
    """

    variant: str
    baseline: str
    in_sentences: str
    reference: str


DISTILLATION = Words('distilled', 'student alone', 'the student alone', 'teacher')
#: The baseline is trained on the labelled source, the oracle on labels of the target that an adaptation does not have.
ADAPTATION = Words('adapted', 'source only', 'source only', 'target oracle')


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def scaled(self, factor: float) -> 'Interval':
        return Interval(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, seed by seed, in points of the metric.

    Attributes:
        values: one difference per seed, in the order of the seeds.
        mean: their mean.
        interval: 95 % Student-t interval of the mean; ``None`` with fewer than two seeds.
        won: number of seeds whose difference is above 0.
    """

    values: tuple[float, ...]
    mean: float
    interval: Interval | None
    won: int

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Difference':
        values = tuple(map(float, values))
        return cls(values, float(np.mean(values)), t_interval(values), sum(v > 0 for v in values))


@dataclass(frozen=True)
class Row:
    """One way of training: the baseline (the student alone, or on the source only), or one variant.

    Attributes:
        name: ``student`` or the variant's name.
        records: the runs, sorted by seed.
        mean, std: of the metric over seeds (``std`` with n - 1; ``None`` for one seed), in percent.
        seconds: mean training time of a run.
        extra_parameters: parameters that only training has.
        difference: to the baseline; ``None`` for the baseline itself.
        gap_closed: mean difference / (teacher - mean baseline), as a fraction; ``None`` without a gap.
        gap_interval: its interval, with teacher and mean baseline held fixed.
        time_ratio: training seconds relative to the baseline; ``None`` where they were not recorded.
        per_class: difference of each class that has a value in every run.
    """

    name: str
    records: tuple[RunRecord, ...]
    mean: float
    std: float | None
    seconds: float
    extra_parameters: int
    difference: Difference | None = None
    gap_closed: float | None = None
    gap_interval: Interval | None = None
    time_ratio: float | None = None
    per_class: dict[str, Difference] = field(default_factory=dict)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(record.value for record in self.records)


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: the baseline, the variants, and what they have in common.

    ``teacher`` is the score of the teacher; of adaptations that of an oracle. ``words`` has their names.
    """

    metric: str
    toolbox: str
    iterations: int
    parameters: int
    seeds: tuple[int, ...]
    teacher: float | None
    student: Row
    variants: tuple[Row, ...]
    words: Words = DISTILLATION

    @property
    def rows(self) -> tuple[Row, ...]:
        return (self.student, *self.variants)

    @property
    def gap(self) -> float | None:
        """Teacher minus mean baseline, in points; ``None`` when the teacher's score is not known."""
        return None if self.teacher is None else self.teacher - self.student.mean

    def gap_sentence(self) -> str:
        """What there was to gain, or why a share of the gap can not be given."""
        baseline, reference = self.words.in_sentences, self.words.reference
        if self.gap is None:
            return (
                f'The share of the gap closed is n/a: the score of the {reference} is not known (give it with '
                '--teacher).'
            )
        if self.gap <= 0:
            return (
                f'The share of the gap closed is n/a: the {reference} ({self.teacher:.2f} {self.metric}) is not better '
                f'than {baseline} ({self.student.mean:.2f} {self.metric}).'
            )
        return f'The {reference} is {self.gap:.2f} {self.metric} above {baseline}.'

    def conclusions(self) -> list[str]:
        """One sentence per variant that claims no more than its interval allows, and the caveats that apply."""
        sentences = [self._conclusion(row) for row in self.variants]
        if len(self.seeds) > 1 and len(self.variants) > 1:
            sentences.append(
                f'{len(self.variants)} variants were tried: each interval is for its variant alone, the best of '
                'several looks better than it is.'
            )
        if self.gap is None or self.gap <= 0:
            sentences.append(self.gap_sentence())
        return sentences

    def _conclusion(self, row: Row) -> str:
        mean, interval = row.difference.mean, row.difference.interval
        if interval is None:
            scored = f'scored {abs(mean):.2f} {self.metric} {"higher" if mean > 0 else "lower"} than'
            return (
                f'{row.name} {"scored the same as" if mean == 0 else scored} {self.words.in_sentences} with seed '
                f'{self.seeds[0]}; one seed gives no interval, so it is not known whether this is more than chance '
                '(use at least 3 seeds).'
            )
        over = f'95 % interval {format_interval(interval)} over {len(self.seeds)} paired seeds'
        if 0 in interval:
            return (
                f'{row.name}: no difference can be claimed, the interval contains 0 '
                f'(difference {mean:+.2f} {self.metric}, {over}).'
            )
        if mean > 0:
            verdict = f'{row.name} is better by {mean:.2f} {self.metric}, {over}'
        else:
            verdict = f'{row.name} is worse: difference {mean:+.2f} {self.metric}, {over}'
        if mean > 0 and row.gap_closed is not None:
            share = format_interval(row.gap_interval, percent=True)
            verdict += f'; closes {100 * row.gap_closed:.0f} % {share} of the gap to the {self.words.reference}'
        return verdict + '.'


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Two-sided Student-t interval of the mean: ``mean +- t((1 + level) / 2, n - 1) * std / sqrt(n)``.

    Returns:
        ``None`` for fewer than two values: nothing is known about their spread.
    """
    n = len(values)
    if n < 2:
        return None
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean - half, mean + half)


def compare(runs: Mapping[str, Sequence[RunRecord]], teacher: float | None = None) -> Comparison:
    """Compare distilled or adapted variants with their baseline, in pairs of equal seed.

    Args:
        runs: records by name; ``student`` has the runs of the baseline, every other name is a variant. Reports speak of
            adaptation where the record of a variant is of an adapted student.
        teacher: the metric of the teacher, or of the oracle, in percent on the same validation set; ``None`` when not
            known.

    Raises:
        ConfigError: runs that can not be compared (other iterations, metric, toolbox, seeds or student).
    """
    if not runs.get(BASELINE):
        raise ConfigError('compare: there is no run of the student alone to compare with')
    variants = [name for name in runs if name != BASELINE]
    if not variants:
        raise ConfigError('compare: there is no distilled run to compare with the student alone')
    sorted_runs = {name: _sorted_by_seed(name, runs[name]) for name in (BASELINE, *variants)}
    reference = sorted_runs[BASELINE][0]
    seeds = tuple(record.seed for record in sorted_runs[BASELINE])
    for name, records in sorted_runs.items():
        for record in records:
            _check_same(reference, record, name)
        own_seeds = tuple(record.seed for record in records)
        if own_seeds != seeds:
            raise ConfigError(
                f'compare: runs are paired by seed, but {BASELINE!r} has seeds {_listed(seeds)} and {name!r} has '
                f'{_listed(own_seeds)}; train the missing ones or leave the others out'
            )

    student = _row(BASELINE, sorted_runs[BASELINE])
    gap = None if teacher is None else teacher - student.mean
    return Comparison(
        metric=reference.metric,
        toolbox=reference.toolbox,
        iterations=reference.iterations,
        parameters=reference.parameters,
        seeds=seeds,
        teacher=teacher,
        student=student,
        variants=tuple(_row(name, sorted_runs[name], student, gap) for name in variants),
        words=_words([record for name in variants for record in sorted_runs[name]]),
    )


def format_interval(interval: Interval | None, percent: bool = False) -> str:
    """``[0.90, 3.30]``, or ``[15 %, 53 %]`` for a fraction, or ``n/a``."""
    if interval is None:
        return 'n/a'
    if percent:
        return f'[{100 * interval.low:.0f} %, {100 * interval.high:.0f} %]'
    return f'[{interval.low:.2f}, {interval.high:.2f}]'


def _words(variants: Sequence[RunRecord]) -> Words:
    return ADAPTATION if any(record.name == ADAPTATION.variant for record in variants) else DISTILLATION


def _sorted_by_seed(name: str, records: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    if not records:
        raise ConfigError(f'compare: {name!r} has no runs')
    records = tuple(sorted(records, key=lambda record: record.seed))
    seeds = [record.seed for record in records]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ConfigError(f'compare: {name!r} has several runs with seed {twice[0]}, give one run per seed')
    for record in records:
        if not record.finished:
            raise ConfigError(f'compare: the run of {name!r} with seed {record.seed} is not finished, resume it first')
        if (record.name == 'student') != (name == BASELINE):
            role = 'a student alone' if name == BASELINE else 'a distilled or adapted student'
            raise ConfigError(
                f'compare: {name!r} should be {role}, but its record with seed {record.seed} is of a run of '
                f'{record.name!r} ({record.checkpoint or "no checkpoint"})'
            )
    return records


def _check_same(reference: RunRecord, record: RunRecord, name: str) -> None:
    for key in ('toolbox', 'metric', 'iterations', 'parameters'):
        expected, found = getattr(reference, key), getattr(record, key)
        if expected != found:
            raise ConfigError(
                f'compare: {name!r} with seed {record.seed} has {key} {found}, but {BASELINE!r} with seed '
                f'{reference.seed} has {expected}; only runs that differ in nothing but distillation (or adaptation) '
                'can be compared'
            )


def _row(name: str, records: tuple[RunRecord, ...], student: Row | None = None, gap: float | None = None) -> Row:
    values = [record.value for record in records]
    seconds = float(np.mean([record.seconds for record in records]))
    row = dict(
        name=name,
        records=records,
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seconds=seconds,
        extra_parameters=max(record.extra_parameters for record in records),
    )
    if student is None:
        return Row(**row, time_ratio=1.0 if seconds > 0 else None)
    difference = Difference.of([a - b for a, b in zip(values, student.values)])
    has_gap = gap is not None and gap > 0
    return Row(
        **row,
        difference=difference,
        gap_closed=difference.mean / gap if has_gap else None,
        gap_interval=difference.interval.scaled(1 / gap) if has_gap and difference.interval else None,
        time_ratio=seconds / student.seconds if student.seconds > 0 and seconds > 0 else None,
        per_class=_class_differences(records, student.records),
    )


def _class_differences(distilled: Sequence[RunRecord], student: Sequence[RunRecord]) -> dict[str, Difference]:
    """Differences of the classes that have a value in every run, in the order of the first record."""
    everything = (*student, *distilled)
    return {
        name: Difference.of([d.per_class[name] - s.per_class[name] for d, s in zip(distilled, student)])
        for name in student[0].per_class
        if all(math.isfinite(record.per_class.get(name, math.nan)) for record in everything)
    }


def _listed(seeds: Sequence[int]) -> str:
    return ', '.join(map(str, seeds))
