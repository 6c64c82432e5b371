"""The measurements as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_dense.analysis.benchmark.measure import WARMUP, Measured, Row, Spread
from kd_dense.analysis.benchmark.memory import MEANING
from kd_dense.checkpoint import atomic_write

NOT_MEASURED = '–'


def table(rows: Sequence[Row], against: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line per variant of a config."""
    rivals = [rival for rival in against if rival != 'student']
    header = ['config', 'distillers', 'student alone, ms', 'teacher, ms', 'step, ms', 'step / bound']
    header += ['step / student alone'] if 'student' in against else []
    for rival in rivals:
        header += [f'{rival}, ms', 'cached / student alone' if rival == 'cached' else f'step / {rival}']
    header += ['peak memory', 'kept for the backward', 'waits']
    return header, [_cells(row, against, rivals) for row in rows]


def _cells(row: Row, against: Sequence[str], rivals: Sequence[str]) -> list[str]:
    student, teacher, step = (row.parts[name] for name in ('student', 'teacher', 'step'))
    cells = [row.config, row.variant, *(_milliseconds(part.spread) for part in (student, teacher, step))]
    cells.append(_ratio(row.ratio))
    cells += [_ratio(row.against('student'))] if 'student' in against else []
    for rival in rivals:
        measured = row.parts.get(rival)
        ratio = row.cached if rival == 'cached' else row.against(rival)
        cells += [NOT_MEASURED] * 2 if measured is None else [_milliseconds(measured.spread), _ratio(ratio)]
    cells += [f'{_mebibytes(getattr(step, key))} ({_mebibytes(getattr(step, key) - getattr(student, key), "+")})'
              for key in ('peak', 'kept')]  # fmt: skip
    return [*cells, f'{step.wait_count} ({step.wait_count - student.wait_count:+d})']


def markdown(rows: Sequence[Row], machine: Mapping[str, Any], against: Sequence[str] = ()) -> str:
    """The table, what was measured above it, and how to read it below."""
    configs = {row.config: row for row in rows}
    iterations = len(rows[0].parts['step'].seconds)
    parts = [
        '# Cost of a training step',
        '\n'.join([f'- {_machine(machine)}', *(f'- {line}' for row in configs.values() for line in _about(row))]),
        markdown_table(*table(rows, against)),
        '\n'.join(f'- {line}' for line in _explanation(rows, iterations)),
    ]
    return '\n\n'.join(parts) + '\n'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first two columns are text, the others numbers."""
    rule = [':--', ':--', *['--:'] * (len(header) - 2)]
    return '\n'.join(
        '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |' for cells in (header, rule, *rows)
    )


def as_json(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Everything that was measured, times in seconds and memory in bytes, not rounded."""
    content = {
        'machine': dict(machine),
        'iterations': len(rows[0].parts['step'].seconds),
        'warmup': WARMUP,
        'peak_memory': MEANING,
        'rows': [
            {
                'config': row.config,
                'variant': row.variant,
                'distillers': {name: dict(one) for name, one in row.distillers.items()},
                'facts': asdict(row.facts),
                'parts': {name: _part(part) for name, part in row.parts.items()},
                'step_over_bound': asdict(row.ratio),
                'cached_over_student': asdict(row.cached) if row.cached else None,
                'step_over': {name: asdict(row.against(name)) for name in row.parts if name not in ('teacher', 'step')},
            }
            for row in rows
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def write(
    rows: Sequence[Row], machine: Mapping[str, Any], folder: str | Path, against: Sequence[str] = ()
) -> list[Path]:
    """Write ``benchmark.md`` and ``benchmark.json`` into ``folder``; returns the files."""
    texts = {'benchmark.md': markdown(rows, machine, against), 'benchmark.json': as_json(rows, machine) + '\n'}
    for name, text in texts.items():
        with atomic_write(Path(folder) / name) as file:
            file.write(text.encode())
    return [Path(folder) / name for name in texts]


def _part(part: Measured) -> dict[str, Any]:
    return {
        'seconds': list(part.seconds),
        'median': part.spread.median,
        'quartiles': [part.spread.low, part.spread.high],
        'peak_bytes': part.peak,
        'kept_bytes': part.kept,
        'waits': dict(part.waits),
    }


def _machine(machine: Mapping[str, Any]) -> str:
    gpus = ', '.join(gpu['name'] for gpu in machine['gpus']) or 'no GPU'
    busy = f'load before the run {machine["load"]:.1f}'  # of what else was running
    return f'{gpus}; {machine["cores"]} CPU cores, {machine["threads"]} threads; {busy}; torch {machine["torch"]}'


def _about(row: Row) -> list[str]:
    facts = row.facts
    height, width = facts.image_size
    weights = 'random weights' if facts.random_teacher else 'trained weights'
    return [
        f'{row.config} ({facts.toolbox}, {facts.device}, {facts.precision}): batch of {facts.batch}, {height} x '
        f'{width} pixels, made up; {facts.optimizer}, a step after every batch, learning rate 0; student '
        f'{_millions(facts.student_parameters)} parameters, teacher {_millions(facts.teacher_parameters)}, {weights}'
    ]


def _explanation(rows: Sequence[Row], iterations: int) -> list[str]:
    lines = [
        f'Median and quartiles of {iterations} repetitions after {WARMUP} that do not count, in turns. A ratio is '
        'taken within each repetition. Bound: student alone plus teacher forward to its deepest tap.',
        f'Peak memory: {MEANING}, on top of weights, optimizer state and batch. Kept for the backward: tensors that '
        'autograd holds between forward and backward. Waits: operations of forward and backward for which a host waits '
        'for its GPU. In parentheses what distillation adds to the student alone.',
    ]
    if any(row.cached for row in rows):
        lines.append(
            'Cached: a step with the same losses that reads the outputs of the teacher from a cache on the disk, in '
            'the process that trains; in a training worker processes read ahead.'
        )
    if any(row.facts.random_teacher for row in rows):
        lines.append(
            'Teachers with random weights: the time of a forward and of a loss does not depend on the values of the '
            'weights, and no score was measured.'
        )
    return lines


def _milliseconds(spread: Spread) -> str:
    middle, low, high = (1e3 * value for value in (spread.median, spread.low, spread.high))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f'{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})'


def _ratio(spread: Spread) -> str:
    return f'{spread.median:.3f} ({spread.low:.3f}–{spread.high:.3f})'


def _mebibytes(count: int, sign: str = '') -> str:
    return f'{count / 2**20:{sign},.1f} MiB'


def _millions(count: int) -> str:
    return f'{count / 1e6:.1f} M'
