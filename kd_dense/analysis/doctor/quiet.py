"""Silence the toolboxes, so that the findings stand out and ``--json`` prints nothing else."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext


def quiet(active: bool = True) -> Callable[[], AbstractContextManager]:
    """A context in which nothing is printed to stdout and only warnings and errors are logged, if ``active``."""
    return _quiet if active else nullcontext


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
