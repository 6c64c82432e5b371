"""Checkpoint files: load them without executing code, write them atomically.

A torch checkpoint is a pickle, and a pickle may name any function to be called while it is read. ``torch.load`` offers
a weights-only mode against this, but that mode rejects MMEngine's own checkpoints, whose log history is stored as
``HistoryBuffer`` objects. :func:`load` therefore reads with an unpickler that resolves a short, explicit list of names
(tensors, NumPy scalars and arrays, plain containers, the toolboxes' record classes) and refuses every other one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import decimal
import importlib
import io
import logging
import os
import pathlib
import pickle
import re
import tarfile
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from kd_dense.errors import ConfigError

MapLocation = str | torch.device | Callable | dict | None


class CheckpointError(ConfigError):
    """A file that cannot be loaded as a checkpoint, or that holds something other than data."""


class _RefusedError(pickle.UnpicklingError):
    """Raised inside the unpickler; carries the dotted name that was refused."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _history_buffer_attribute(owner: Any, name: str) -> Callable:
    """Stand-in for the ``getattr`` with which a HistoryBuffer refers to its own statistics methods."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise _RefusedError(f'builtins.getattr({owner!r}, {name!r})')


def _encode_latin1(text: str, encoding: str = 'latin1') -> bytes:
    """Stand-in for ``_codecs.encode``, which pickle protocol 2 uses to rebuild ``bytes``."""
    if encoding not in ('latin1', 'latin-1'):
        raise _RefusedError(f'_codecs.encode(..., {encoding!r})')
    return text.encode('latin-1')


# Everything a pickle may name, by "module.name", except the families that _resolve() recognises by type.
_PLAIN: dict[str, Any] = {
    **{f'builtins.{t.__name__}': t for t in (bool, int, float, complex, str, bytes, bytearray)},
    **{f'builtins.{t.__name__}': t for t in (list, tuple, dict, set, frozenset, slice, range, object)},
    'builtins.getattr': _history_buffer_attribute,
    '_codecs.encode': _encode_latin1,
    'copyreg._reconstructor': importlib.import_module('copyreg')._reconstructor,
    'collections.OrderedDict': collections.OrderedDict,
    'collections.defaultdict': collections.defaultdict,
    'collections.Counter': collections.Counter,
    'collections.deque': collections.deque,
    'types.SimpleNamespace': types.SimpleNamespace,
    'argparse.Namespace': argparse.Namespace,
    'decimal.Decimal': decimal.Decimal,
    **{f'datetime.{n}': getattr(datetime, n) for n in ('datetime', 'date', 'time', 'timedelta', 'timezone')},
    # Paths in a "meta" entry: the pure classes hold text only, and load on another operating system too.
    'pathlib.PosixPath': pathlib.PurePosixPath,
    'pathlib.PurePosixPath': pathlib.PurePosixPath,
    'pathlib.WindowsPath': pathlib.PureWindowsPath,
    'pathlib.PureWindowsPath': pathlib.PureWindowsPath,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'torch.Tensor': torch.Tensor,
    'torch.UntypedStorage': torch.UntypedStorage,
    'torch.storage.UntypedStorage': torch.UntypedStorage,
    'torch.nn.parameter.Parameter': torch.nn.Parameter,
    'torch.serialization._get_layout': torch.serialization._get_layout,
    'torch._tensor._rebuild_from_type_v2': torch._tensor._rebuild_from_type_v2,
    'numpy.dtype': np.dtype,
    'numpy.ndarray': np.ndarray,
}
_TORCH_REBUILD = (
    '_rebuild_tensor',
    '_rebuild_tensor_v2',
    '_rebuild_tensor_v3',
    '_rebuild_parameter',
    '_rebuild_parameter_with_state',
    '_rebuild_sparse_tensor',
    '_rebuild_qtensor',
)
_NUMPY_REBUILD = {'multiarray': ('scalar', '_reconstruct'), 'numeric': ('_frombuffer',)}
# The toolboxes' record classes: containers of plain data, with no behaviour when they are rebuilt.
_RECORDS = {
    'mmengine.logging.history_buffer.HistoryBuffer',
    'mmengine.config.config.ConfigDict',
    'addict.addict.Dict',
}
# Protocols 0 to 2 write Python 2's names for these modules.
_PYTHON2_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}


def _resolve(module: str, name: str) -> Any:
    """The object that a pickle's ``module.name`` stands for; :class:`_RefusedError` if it is not on the list."""
    module = _PYTHON2_MODULES.get(module, module)
    full = f'{module}.{name}'
    if full in _PLAIN:
        return _PLAIN[full]
    if full in _RECORDS:
        return getattr(importlib.import_module(module), name)
    if module == 'torch._utils' and name in _TORCH_REBUILD:
        return getattr(torch._utils, name)
    if module == 'torch':  # torch.float32, torch.strided, torch.per_tensor_affine ...
        value = getattr(torch, name, None)
        if isinstance(value, (torch.dtype, torch.layout, torch.qscheme, torch.memory_format)):
            return value
    package, _, part = module.rpartition('.')
    if package in ('numpy.core', 'numpy._core') and name in _NUMPY_REBUILD.get(part, ()):
        core = 'numpy._core' if hasattr(np, '_core') else 'numpy.core'  # renamed in NumPy 2
        return getattr(importlib.import_module(f'{core}.{part}'), name)
    if module in ('numpy', 'numpy.dtypes'):  # numpy.float64, numpy.dtypes.Float64DType
        value = getattr(np if module == 'numpy' else np.dtypes, name, None)
        if isinstance(value, type) and issubclass(value, (np.generic, np.dtype)):
            return value
    # HistoryBuffer's methods, as protocol 4 and later write them.
    if module == 'mmengine.logging.history_buffer' and name.startswith('HistoryBuffer.'):
        return _history_buffer_attribute(HistoryBuffer, name.partition('.')[2])
    raise _RefusedError(full)


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _resolve(module, name)


def _data_load(file: Any, **kwargs: Any) -> Any:
    return _DataUnpickler(file, **kwargs).load()


# What torch.load expects of its ``pickle_module`` argument.
_DATA_PICKLE = types.SimpleNamespace(
    __name__='kd_dense.checkpoint', Unpickler=_DataUnpickler, load=_data_load, UnpicklingError=pickle.UnpicklingError
)


def load(path: str | os.PathLike, map_location: MapLocation = 'cpu', trusted: bool = False) -> dict:
    """Load a checkpoint file without executing code.

    Reads what ``torch.save`` writes (zip files and the older plain pickles) and admits tensors, NumPy scalars and
    arrays, plain containers, and the record classes that MMEngine stores in its checkpoints. ``HistoryBuffer`` objects
    come back as the real thing, so that ``Runner.resume`` works on the result.

    Args:
        path: the file.
        map_location: as in ``torch.load``.
        trusted: load with the ordinary unpickler, which calls whatever the file names. For files whose origin is known
            and which hold more than data, such as whole pickled models.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        CheckpointError: the file is truncated, is no checkpoint, or names something that is not data.
    """
    path = Path(path).expanduser()
    check_readable(path)
    if trusted:
        print_log(
            f'{path} is loaded as trusted: its pickle may call any function with your rights.',
            logger='current',
            level=logging.WARNING,
        )
    pickle_module = pickle if trusted else _DATA_PICKLE
    try:
        return torch.load(path, map_location=map_location, pickle_module=pickle_module, weights_only=False)
    except _RefusedError as error:
        raise CheckpointError(
            f'{path} names {error.name}, which is not plain data and could run code, so it was not loaded; if you know '
            'where the file comes from, load it with trusted=True, which lets the file call any function.'
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise CheckpointError(f'{path} could not be loaded as a checkpoint ({reason}); check the file.') from error


def check_readable(path: Path) -> None:
    """One sentence for the ordinary mistakes, before torch's own less helpful ones.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        CheckpointError: it is empty, truncated, or another kind of file.
    """
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; name the checkpoint file in it.')
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint file {path}; check the path.')
    with path.open('rb') as file:
        start = file.read(4)
    if not start:
        raise CheckpointError(f'{path} is empty; copy or write the checkpoint again.')
    if start.startswith(b'PK'):
        if not zipfile.is_zipfile(path):  # the table of contents is at the end of the file
            raise CheckpointError(f'{path} is truncated; copy or write the checkpoint again.')
        with zipfile.ZipFile(path) as archive:
            if any(entry.endswith('/constants.pkl') for entry in archive.namelist()):
                raise CheckpointError(f'{path} is a TorchScript program; a checkpoint with weights is needed.')
    elif tarfile.is_tarfile(path):
        raise CheckpointError(f'{path} is a tar archive; a file written by torch.save is needed.')


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike):
    """Open a binary file that takes the place of ``path`` when the block ends well, and else leaves it alone.

    A process that is killed meanwhile leaves the temporary file behind, see :func:`remove_leftovers`.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))  # a link keeps pointing at the file it points at
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')  # same folder: a rename cannot cross file systems
    try:
        with temporary.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


_LEFTOVER = re.compile(r'\..+\.(\d+\.tmp|stripped)')


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Delete what writers that were killed left in ``folder``, and return the names; no other may be writing there."""
    found = [p for p in Path(folder).glob('.*') if _LEFTOVER.fullmatch(p.name) and p.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in found)


def save(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that is atomic: ``path`` is at every moment either the old file or the complete new one."""
    # In memory first, as MMEngine does: where the disk is full, torch's writer replaces the reason by one of its own.
    with io.BytesIO() as buffer:
        torch.save(obj, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())


def latest(work_dir: str | os.PathLike) -> str | None:
    """The checkpoint of MMEngine from which a run in ``work_dir`` goes on; ``None`` when there is none.

    That is what the file ``last_checkpoint`` names, also where ``work_dir`` was moved. Where that file is missing, or
    was cut short by a crash, it is the checkpoint that was written last.
    """
    folder = Path(work_dir)
    pointer = folder / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    for path in (Path(named), folder / Path(named).name) if named else ():
        if path.exists():
            return str(path)
    written = [p for p in folder.glob('*.pth') if re.fullmatch(r'(iter|epoch)_\d+\.pth|interrupted\.pth', p.name)]
    return str(max(written, key=lambda p: p.stat().st_mtime)) if written else None


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The plain tensor dict of a loaded checkpoint.

    Takes ``{'state_dict': ...}`` (OpenMMLab), ``{'model': ...}`` (many others; a whole module counts by its state dict)
    or a bare dict of tensors. The prefix ``module.``, which DataParallel and DDP put before every name, is removed.

    Raises:
        CheckpointError: there are no tensors under any of these.
    """
    state: Any = checkpoint
    if isinstance(checkpoint, Mapping):
        for key in ('state_dict', 'model'):
            if key in checkpoint and not isinstance(checkpoint[key], torch.Tensor):
                state = checkpoint[key]
                break
    if isinstance(state, torch.nn.Module):
        state = state.state_dict()
    if not isinstance(state, Mapping) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        found = (
            ', '.join(map(str, list(checkpoint)[:6])) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        )
        raise CheckpointError(
            f"The checkpoint holds no weights under 'state_dict', 'model' or at its top level (found: {found})."
        )
    prefix = 'module.'
    cut = len(prefix) if all(name.startswith(prefix) for name in state) else 0
    return {name[cut:]: value for name, value in state.items() if isinstance(value, torch.Tensor)}
