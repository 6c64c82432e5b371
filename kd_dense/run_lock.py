"""One run per work directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.logging import print_log

from kd_dense.errors import ConfigError

FILE_NAME = '.lock'
#: Where a launcher says which process of a run this is.
_RANK = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


def is_first_process(launcher: str) -> bool:
    """Is this the first process of a run? Known before any process group exists."""
    return int(os.environ.get(_RANK.get(launcher, ''), 0)) == 0


@contextmanager
def locked(work_dir: str | os.PathLike, launcher: str = 'none') -> Iterator[None]:
    """Own ``work_dir`` while inside; of the processes of one run, the first one does.

    The lock is a POSIX record lock: it ends with the process, however that ends, child processes do not inherit it, and
    network file systems know it. The file stays behind and means nothing by itself.

    Raises:
        ConfigError: another process is writing there.
    """
    if not is_first_process(launcher):
        yield
        return
    path = Path(work_dir).expanduser() / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(
                f'work_dir: {path.parent} is being written to by {_owner(file.read())}; wait until it ends, or choose '
                'another folder with --work-dir'
            ) from None
        except OSError as error:  # a file system without locks
            print_log(f'{path.parent} can not be locked ({error.strerror}): see to it that no other run writes there')
        else:
            file.truncate(0)
            since = time.strftime('%Y-%m-%d %H:%M:%S')
            json.dump({'process': os.getpid(), 'host': socket.gethostname(), 'since': since}, file)
            file.flush()
        yield


def _owner(text: str) -> str:
    try:
        found = json.loads(text)
        return f'process {found["process"]} on {found["host"]} since {found["since"]}'
    except (ValueError, KeyError, TypeError):
        return 'another process'
