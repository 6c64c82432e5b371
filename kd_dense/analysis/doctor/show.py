"""The findings of the doctor on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from kd_dense.analysis.doctor.report import FAILED, PASSED, SKIPPED, WARNING, Check, Report
from kd_dense.analysis.tap_table import rich_tap_table
from kd_dense.distillation import Distillers

_MARKS = {
    PASSED: ('ok', 'green'),
    WARNING: ('warning', 'yellow'),
    FAILED: ('FAILED', 'red'),
    SKIPPED: ('skipped', 'dim'),
}


def check(found: Check, console: Console, distillers: Distillers | None = None) -> None:
    """Print one check: its name, its facts, and what is wrong."""
    mark, style = _MARKS[found.status]
    console.print(f'[bold]{found.name}[/bold] [{style}]{mark}[/{style}]', highlight=False)
    if found.skipped is not None:
        _text(console, found.skipped)
    facts = _FACTS.get(found.name)
    if found.facts and facts is not None:
        for part in facts(found.facts):
            if isinstance(part, str):
                _text(console, part)
            else:
                console.print(part)
    if found.name == 'taps' and distillers is not None:
        console.print(rich_tap_table(distillers.table))
    for sentence in found.failures:
        _text(console, f'failed: {sentence}', 'red')
    for sentence in found.warnings:
        _text(console, f'warning: {sentence}', 'yellow')


def verdict(report: Report, console: Console) -> None:
    """Print the last line."""
    console.print(f'[bold]{escape(report.verdict)}[/bold]', highlight=False)


def _text(console: Console, text: str, style: str = '') -> None:
    console.print(f'  {escape(text)}', style=style, highlight=False, soft_wrap=True)


def _environment(facts: Mapping[str, Any]) -> list[RenderableType]:
    versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items() if version)
    operators = 'load' if facts['mmcv_operators'] else 'do not load'
    gpus = ', '.join(f'{gpu["name"]} ({_bytes(gpu["memory_bytes"])})' for gpu in facts['gpus'])
    memory = _bytes(facts['memory_bytes']) if facts['memory_bytes'] else 'unknown'
    return [
        f'python {facts["python"]}, torch {facts["torch"]}',
        f'{versions} (OpenMMLab: {facts["openmmlab_family"] or "not installed"}; operators of mmcv {operators})',
        f'{gpus or "no GPU"}; {facts["cores"]} cores, {facts["threads"]} threads, {memory} of memory; '
        f'runs on {facts["device"]}',
    ]


def _config(facts: Mapping[str, Any]) -> list[RenderableType]:
    return [f'{facts["path"]} ({facts["toolbox"]})']


def _distillers(facts: Mapping[str, Any]) -> list[RenderableType]:
    return [', '.join(facts['names'])]


def _teacher(facts: Mapping[str, Any]) -> list[RenderableType]:
    strict = 'strict' if facts['strict'] else f'may differ: {", ".join(facts["allow"])}'
    frozen = 'frozen, in evaluation mode' if facts['frozen_and_eval'] else 'NOT frozen'
    return [f'{facts["report"] or facts["type"] + ", built elsewhere"} ({strict})', f'{facts["type"]}, {frozen}']


def _data(facts: Mapping[str, Any]) -> list[RenderableType]:
    return [
        f'{facts["train_images"]:,} training images in batches of {facts["batch_size"]}, '
        f'{facts["val_images"]:,} validation images'
    ]


def _student(facts: Mapping[str, Any]) -> list[RenderableType]:
    return [
        f'{facts["type"]}, {facts["parameters"]:,} parameters, of which {facts["trained_parameters"]:,} are trained'
    ]


def _scores(facts: Mapping[str, Any]) -> list[RenderableType]:
    if 'student' not in facts:
        return []
    which = 'all' if facts['images'] == facts['all_images'] else f'{facts["images"]} of'
    title = f'{which} {facts["all_images"]} validation images; the student is at its initialisation'
    keys = list(dict.fromkeys([*facts['teacher'], *facts['student']]))
    table = _table('score', 'teacher', 'student')
    for key in keys:
        table.add_row(key, *(_number(facts[side].get(key)) for side in ('teacher', 'student')))
    lacking = [side for side in ('teacher', 'student') if set(keys) - set(facts[side])]
    return [title, table, *(f'-: the {side} found nothing' for side in lacking)]


def _classes(facts: Mapping[str, Any]) -> list[RenderableType]:
    counts = [f'{side} {len(facts[side]) if facts[side] is not None else "?"}' for side in ('student', 'teacher')]
    return [f'class lists: {facts["result"]} ({", ".join(counts)})']


def _preprocessing(facts: Mapping[str, Any]) -> list[RenderableType]:
    lines = []
    for side in ('student', 'teacher'):
        value = facts[side]
        text = (
            'not normalised'
            if value is None
            else f'{value["order"]}, mean {_row(value["mean"])}, std {_row(value["std"])}'
        )
        lines.append(f'{side}: {text}')
    if 'identity' in facts:
        changes = ['the channels reversed'] if facts['channels_reversed'] else []
        if facts['gain'] is not None:
            changes.append(f'x * {_row(facts["gain"])} + {_row(facts["shift"])}')
        if facts['scale'] != 1:
            changes.append(f'{facts["scale"]:g} times the size')
        lines.append('the teacher sees ' + ('; '.join(changes) or 'the same images as the student'))
    return lines


def _gradients(facts: Mapping[str, Any]) -> list[RenderableType]:
    losses = facts['task_loss']
    table = _table(
        *('distiller', 'loss weight', 'weighted loss', 'share of the task', 'at the taps', 'reaches', 'connectors'),
    )
    for name, term in facts['terms'].items():
        connectors = 'none'
        if term['connectors']:
            dead = term['connectors_without_gradient']
            connectors = f'no gradient: {", ".join(dead)}' if dead else 'all learn'
        table.add_row(
            name,
            f'{term["weight"]:.4g}' + (' (auto)' if term['auto'] else ''),
            _range(term['loss']),
            _shares(term['share']),
            _shares(term['share_at_taps']),
            _layers(term['layers']),
            connectors,
        )
    steps = f'{facts["iterations"]} training steps, at full loss weight; loss of the task: {_range(losses)}'
    return [steps, table]


def _cost(facts: Mapping[str, Any]) -> list[RenderableType]:
    table = _table('part', 'time', 'memory')
    rows = {
        'student, forward and backward': facts['student'],
        'teacher, forward to its deepest tap': facts['teacher'],
        **{f'distiller {name}': part for name, part in facts['terms'].items()},
        'whole step': facts['step'],
    }
    for name, part in rows.items():
        table.add_row(name, f'{part["milliseconds"]:.1f} ms', _bytes(part['memory']))
    return [f'memory: {facts["memory_kind"]}', table, f'whole step / (student + teacher) = {facts["ratio"]:.2f}']


_FACTS = {
    'environment': _environment,
    'config': _config,
    'distillers': _distillers,
    'teacher': _teacher,
    'data': _data,
    'student': _student,
    'scores': _scores,
    'classes': _classes,
    'preprocessing': _preprocessing,
    'gradients': _gradients,
    'cost': _cost,
}


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify='left' if i == 0 or column in ('reaches', 'connectors') else 'right')
    return table


def _layers(layers: Mapping[str, float | None]) -> str:
    """``backbone 12 %, neck 9 %``; ``model.0 .. model.16 4 % - 20 %`` where there are many."""
    reached = {name: share for name, share in layers.items() if share is None or share > 0}
    if len(reached) <= 4:
        return ', '.join(f'{name} {_percent(share)}' for name, share in reached.items()) or 'nothing'
    names = list(reached)
    known = [share for share in reached.values() if share is not None]
    span = f' {_percent(min(known))} - {_percent(max(known))}' if known else ''
    return f'{names[0]} .. {names[-1]}{span} ({len(names)} of {len(layers)})'


def _percent(share: float | None) -> str:
    if share is None:
        return '-'
    return f'{100 * share:.2g} %' if share < 0.995 else f'{100 * share:,.0f} %'


def _shares(shares: list[float | None]) -> str:
    known = sorted(s for s in shares if s is not None)
    if not known:
        return '-'
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    return f'{_percent(middle)} ({_percent(known[0])} - {_percent(known[-1])})' if len(known) > 1 else _percent(middle)


def _range(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return '-'
    low, high = f'{min(known):.4g}', f'{max(known):.4g}'
    return low if low == high else f'{low} - {high}'


def _row(values: list[float]) -> str:
    return '[' + ', '.join(f'{v:.4g}' for v in values) + ']'


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.4g}'


def _bytes(count: int) -> str:
    for unit, size in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
        if count >= size:
            return f'{count / size:.1f} {unit}'
    return f'{count} bytes'
