"""The taps of a distillation as a table."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from kd_dense.distillation import TapRow


def tap_table(rows: Iterable[TapRow]) -> str:
    """The taps of every distiller as text, one line per role: both tensors, connector, loss and its weight."""
    with io.StringIO() as text:
        Console(width=160, file=text).print(rich_tap_table(rows))
        return text.getvalue()


def rich_tap_table(rows: Iterable[TapRow]) -> Table:
    """:func:`tap_table` before it is laid out."""
    table = Table(title='taps', box=box.SIMPLE, expand=False)
    for column in ('distiller', 'loss', 'role', 'student', 'teacher', 'connector', 'parameters', 'loss weight'):
        table.add_column(column, justify='right' if column == 'parameters' else 'left')
    for row in rows:
        table.add_row(
            row.distiller,
            row.method,
            row.role,
            row.student.replace('; ', '\n'),
            row.teacher.replace('; ', '\n'),
            row.connector,
            f'{row.connector_parameters:,}',
            row.loss_weight,
        )
    return table
