"""Errors a user can act on: one sentence with the config key or file, and what to do."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """A config that can not work; the message names the key or file and says what to do, and tools print only that."""


class DistillationError(RuntimeError):
    """A run that can not go on: a loss that is not finite, a connector without gradient, a tap that never fires."""


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


def exit_with_sentence(main: Callable) -> Callable:
    """Decorator for the ``main`` of a tool: our own errors end it with ``error: ...`` on stderr and exit code 2.

    Every other exception is a bug of ours or of a toolbox and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (ConfigError, DistillationError) as error:
            print('error: ' + ' '.join(str(error).split()), file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper
