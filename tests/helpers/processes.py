"""Runs in processes of their own that can be killed, without the seconds that importing the toolboxes takes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch


def in_a_fork(action: Callable[[], object], errors: Path) -> int:
    """Call ``action`` in a forked process and wait for it.

    Args:
        errors: gets everything that the process wrote, and the traceback of an exception.

    Returns:
        0 when ``action`` returned, 1 when it raised, minus the number of the signal that killed the process otherwise.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # pytest has put objects of its own there
            sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(file, 'w', closefd=False), write_through=True)
            action()
            code = 0
        except BaseException:
            with contextlib.suppress(Exception):
                traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_myself() -> None:
    """SIGKILL: nothing gets a chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def killed_while_writing(name: str) -> Iterator[None]:
    """Inside, this process is killed as soon as half of the file ``name`` is on the disk."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.startswith(f'.{name}.'):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill_myself()
        original(descriptor)

    with mock.patch('os.fsync', fsync):
        yield


def assert_equal(a: object, b: object, where: str = '') -> None:
    """Bit for bit, through all containers."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), (where, a.keys() ^ b.keys())
        for key in a:
            assert_equal(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f'{where}[{i}]')
    else:
        assert a == b or (a != a and b != b), (where, a, b)
