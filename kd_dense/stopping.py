"""SIGINT and SIGTERM as a request to save and stop, instead of an end in the middle of something."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested: int | None = None


def requested() -> int | None:
    """The number of the signal that asked this process to stop; ``None`` when none did."""
    return _requested


def name_of(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM is only noted, see :func:`requested`; a second one does what it always does.

    A signal to the whole process group, such as Ctrl-C in a terminal, reaches the workers of a data loader too. Forked
    inside, they do not react to SIGINT. A SIGTERM ends them, which PyTorch reports by an exception in the middle of
    whatever the main process is doing; that is switched off once the signal was noted, so that it can be finished.
    Does nothing outside of the main thread, where Python handles no signals.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    child_handler = signal.getsignal(signal.SIGCHLD)

    def note(number: int, frame: FrameType | None) -> None:
        global _requested
        if os.getpid() != owner:
            return
        _requested = number
        signal.signal(number, before[number])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # not print(), which a signal may have interrupted
        os.write(2, f'{name_of(number)}: saving at the next chance; send it again to end at once\n'.encode())

    _requested = None
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _requested is not None:
            signal.signal(signal.SIGCHLD, child_handler)
        _requested = None
