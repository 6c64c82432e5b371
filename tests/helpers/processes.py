"""Runs in processes of their own that can be killed, without the seconds that importing the toolboxes takes."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import cloudpickle
import torch


def in_a_fork(action: Callable[[], object], errors: Path) -> int:
    """Call ``action`` in a process of its own and wait for it.

    The process is forked from a server that has imported the toolboxes and done nothing else. A fork of the process
    that runs the tests may hang: it has the locks that other threads (of plots, say) held at that moment.

    Args:
        action: sent by value, with whatever it refers to; the module of a test that it is from is imported there.
        errors: gets everything that the process wrote, and the traceback of an exception.

    Returns:
        0 when ``action`` returned, 1 when it raised, minus the number of the signal that killed the process otherwise.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['kd_dense', 'mmdet.models', 'mmseg.models', 'kd_dense.yolo'])
    message = cloudpickle.dumps((action, dict(os.environ), os.getcwd()))
    process = context.Process(target=_run, args=(action.__module__, message, str(errors)))
    process.start()
    process.join()
    return process.exitcode


def _run(module: str, message: bytes, errors: str) -> None:
    code = 1
    try:
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(file, 'w', closefd=False), write_through=True)
        importlib.import_module(module)  # it may register hooks
        action, environment, folder = cloudpickle.loads(message)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        action()
        code = 0
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(code)


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
