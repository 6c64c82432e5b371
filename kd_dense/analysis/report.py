"""A comparison in words and tables: for the terminal, as Markdown and as CSV."""

import csv
import io
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd_dense.analysis.compare import Comparison, Row, format_interval

NOT_AVAILABLE = 'n/a'
CLASSES_ON_SCREEN = 24


def score_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table: baseline, variants, and the teacher or oracle."""
    measured = ['difference', '95 % interval', 'seeds won', 'gap closed', 'time', 'extra parameters']
    header = ['', comparison.metric, *measured]
    rows = [_score_cells(row, comparison) for row in comparison.rows]
    if comparison.teacher is not None:
        rows.append([comparison.words.reference, f'{comparison.teacher:.2f}', *['–'] * (len(header) - 2)])
    return header, rows


def seed_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the metric of every run: a row per seed, a column per way of training."""
    header = ['seed', comparison.words.baseline]
    for row in comparison.variants:
        header += [row.name, 'difference']
    rows = []
    for i, seed in enumerate(comparison.seeds):
        cells = [str(seed), f'{comparison.student.values[i]:.2f}']
        for row in comparison.variants:
            cells += [f'{row.values[i]:.2f}', f'{row.difference.values[i]:+.2f}']
        rows.append(cells)
    return header, rows


def class_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the per-class means and differences; no rows when the runs recorded no classes."""
    header = ['class', comparison.words.baseline]
    for row in comparison.variants:
        header += [row.name, 'difference', '95 % interval']
    rows = []
    for name in comparison.variants[0].per_class:
        student = _class_mean(comparison.student, name)
        cells = [name, f'{student:.2f}']
        for row in comparison.variants:
            if name in row.per_class:
                change = row.per_class[name]
                cells += [f'{student + change.mean:.2f}', f'{change.mean:+.2f}', format_interval(change.interval)]
            else:
                cells += [NOT_AVAILABLE] * 3
        rows.append(cells)
    return header, rows


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print the tables and the conclusions to the terminal."""
    console = console or Console()
    console.print()
    console.print(_rich_table(*_stacked(*score_table(comparison)), title=_title(comparison)))
    console.print(_rich_table(*seed_table(comparison), title='by seed'))
    header, rows = class_table(comparison)
    if rows:
        title = 'by class (mean over seeds)'
        if len(rows) > CLASSES_ON_SCREEN:
            title = f'the {CLASSES_ON_SCREEN} of {len(rows)} classes that changed most (mean over seeds)'
            changes = comparison.variants[0].per_class
            rows = sorted(rows, key=lambda cells: -abs(changes[cells[0]].mean))[:CLASSES_ON_SCREEN]
        console.print(_rich_table(header, rows, title=title))
    for sentence in comparison.conclusions():
        console.print(f'[bold]{escape(sentence)}[/bold]', highlight=False)


def markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The report as Markdown; ``picture`` is the path of the PNG to show, relative to the Markdown file."""
    parts = [f'# {_title(comparison)}', *comparison.conclusions()]
    if picture:
        parts.append(f'![scores, differences and examples]({picture})')
    parts += [
        '## Scores',
        _markdown_table(*score_table(comparison)),
        '## By seed',
        _markdown_table(*seed_table(comparison)),
    ]
    header, rows = class_table(comparison)
    if rows:
        parts += ['## By class (mean over seeds)', _markdown_table(header, rows)]
    parts += ['## How to read this', _explanation(comparison)]
    return '\n\n'.join(parts) + '\n'


def csv_text(comparison: Comparison) -> str:
    """The report as CSV: a line per run (``row=run``), then a line per way of training (``row=summary``)."""
    columns = [
        'row', 'name', 'seed', 'metric', 'value', 'std', 'difference', 'interval_low', 'interval_high', 'seeds_won',
        'gap_closed', 'gap_closed_low', 'gap_closed_high', 'seconds', 'time_ratio', 'iterations', 'parameters',
        'extra_parameters', 'checkpoint', 'config',
    ]  # fmt: skip
    stream = io.StringIO()
    # Numbers are written with full precision: the file is for further computation.
    writer = csv.DictWriter(stream, columns, restval='', lineterminator='\n')
    writer.writeheader()
    common = dict(metric=comparison.metric, iterations=comparison.iterations, parameters=comparison.parameters)
    for row in comparison.rows:
        for i, record in enumerate(row.records):
            line = dict(common, row='run', name=row.name, seed=record.seed, value=record.value, seconds=record.seconds)
            line.update(extra_parameters=record.extra_parameters, checkpoint=record.checkpoint, config=record.config)
            if row.difference:
                line['difference'] = row.difference.values[i]
            writer.writerow(line)
    for row in comparison.rows:
        line = dict(common, row='summary', name=row.name, value=row.mean, std=row.std, seconds=row.seconds)
        line.update(time_ratio=row.time_ratio, extra_parameters=row.extra_parameters, gap_closed=row.gap_closed)
        if row.difference:
            line.update(difference=row.difference.mean, seeds_won=row.difference.won)
            if row.difference.interval:
                line.update(interval_low=row.difference.interval.low, interval_high=row.difference.interval.high)
        if row.gap_interval:
            line.update(gap_closed_low=row.gap_interval.low, gap_closed_high=row.gap_interval.high)
        writer.writerow(line)
    if comparison.teacher is not None:
        writer.writerow(dict(row='summary', name='teacher', metric=comparison.metric, value=comparison.teacher))
    return stream.getvalue()


def write_report(comparison: Comparison, folder: Path, picture: str | None = None) -> list[Path]:
    """Write ``comparison.md`` and ``comparison.csv`` into ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {'comparison.md': markdown(comparison, picture), 'comparison.csv': csv_text(comparison)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8')
    return [folder / name for name in files]


def _title(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return (
        f'Compared with {comparison.words.in_sentences}: {comparison.metric} in percent, {comparison.iterations} '
        f'iterations, {count} {"seed" if count == 1 else "paired seeds"}'
    )


def _score_cells(row: Row, comparison: Comparison) -> list[str]:
    mean = f'{row.mean:.2f}' + ('' if row.std is None else f' ± {row.std:.2f}')
    time = NOT_AVAILABLE if row.time_ratio is None else f'{row.time_ratio:.2f}x ({row.seconds:.0f} s)'
    if row.difference is None:
        return [comparison.words.baseline, mean, '–', '–', '–', '–', time, '–']
    share = NOT_AVAILABLE
    if row.gap_closed is not None:
        share = f'{100 * row.gap_closed:.0f} %'
        if row.gap_interval:
            share += ' ' + format_interval(row.gap_interval, percent=True)
    return [
        row.name,
        mean,
        f'{row.difference.mean:+.2f}',
        format_interval(row.difference.interval),
        f'{row.difference.won} of {len(comparison.seeds)}',
        share,
        time,
        f'{row.extra_parameters:,}',
    ]


def _class_mean(row: Row, name: str) -> float:
    return sum(record.per_class[name] for record in row.records) / len(row.records)


def _stacked(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The main table with spreads and intervals on a second line, so that it fits a terminal of 80 columns."""
    at = header.index('95 % interval')
    header = ['', header[1], 'difference\n[95 %]', 'seeds\nwon', 'gap\nclosed', 'time', 'extra\nparams']
    stacked = []
    for cells in rows:
        interval = '' if cells[at] == '–' else f'\n{cells[at]}'
        cells = [*cells[: at - 1], cells[at - 1] + interval, *cells[at + 1 :]]
        broken = [c.replace(' ±', '\n±').replace('% [', '%\n[').replace(' (', '\n(') for c in cells[1:]]
        stacked.append([cells[0], *broken])
    return header, stacked


def _rich_table(header: list[str], rows: list[list[str]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify='left', title_style='bold', padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        table.add_column(escape(name), justify='left' if i == 0 else 'right', no_wrap=True, overflow='fold')
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'

    return '\n'.join([line(header), '|'.join(['', ' :-- ', *[' --: '] * (len(header) - 1), '']), *map(line, rows)])


def _explanation(comparison: Comparison) -> str:
    baseline, reference = comparison.words.in_sentences, comparison.words.reference
    lines = [
        f'Scores are {comparison.metric} of the last validation, mean ± standard deviation over seeds. The difference '
        f'is to {baseline} within each seed, with the 95 % Student-t interval of its mean over seeds.',
        f'The share of the gap closed is the mean difference divided by ({reference} minus the mean of {baseline}); '
        'its interval holds the two scores of the gap fixed.',
        f'Student: {comparison.parameters:,} parameters. Time is that of the training loop without validation, '
        f'relative to {baseline}. Extra parameters exist in training only and are not in the checkpoint.',
    ]
    if comparison.gap is not None and comparison.gap > 0:
        lines.append(comparison.gap_sentence())
    return '\n'.join(f'- {line}' for line in lines)
