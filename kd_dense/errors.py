"""Errors a user can act on: one sentence with the config key or file, and what to do."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A config that can not work; the message names the key or file and says what to do, and tools print only that."""


class DistillationError(RuntimeError):
    """A run that can not go on: a loss that is not finite, a connector without gradient, a tap that never fires."""


class Interrupted(Exception):
    """A run that a signal stopped after its state was saved.

    Args:
        message: what was saved, and how to go on.
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """``did you mean 'a', 'b'?`` for the names closest to ``name``, or a list of all when none is close."""
    names = sorted(set(map(str, candidates)))
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if not near:
        lower = {n.lower(): n for n in names}
        near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.5)]
    if near:
        return 'did you mean ' + ', '.join(map(repr, near)) + '?'
    if len(names) > 20:
        names = names[:20] + ['...']
    return 'known: ' + ', '.join(names) if names else 'there are none'


def sentence(error: Exception) -> str:
    """The message on one line; of an error in a worker process of a data loader without the traceback around it."""
    text = str(error)
    if text.startswith('Caught ') and 'Traceback' in text:
        text = text.rpartition(f'{type(error).__name__}: ')[2]
    return ' '.join(text.split())


def cause(error: Exception) -> str:
    """Type and first line of an error of another library, to stand in a sentence of ours."""
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def exit_with_sentence(main: Callable) -> Callable:
    """Decorator for the ``main`` of a tool: our own errors end it with ``error: ...`` on stderr and exit code 2.

    A run that a signal stopped ends with ``stopped: ...`` and 128 plus the number of the signal, as a shell reports it.
    Every other exception is a bug of ours or of a toolbox and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (ConfigError, DistillationError) as error:
            print('error: ' + sentence(error), file=sys.stderr, flush=True)
            sys.exit(2)
        except Interrupted as error:
            print('stopped: ' + sentence(error), file=sys.stderr, flush=True)
            sys.exit(128 + error.signal)

    return wrapper
