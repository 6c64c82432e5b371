"""The files of a cache: a manifest, and shards of records that are written whole or not at all.

A cache is a folder with ``cache.json`` and ``shard-NNNNN.safetensors``. Record ``view * samples + index`` is that view
of that sample; each shard holds as many consecutive records, and in its header, for each, the seed of the view and the
CRC-32 of the augmented image and of what is kept.

Records of a few hundred bytes, which would be smaller than what a header says about them, are rows of as many tensors
as one record has (``Manifest.rows``); the seeds and checksums are one more, ``checks``.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kd_dense.checkpoint import atomic_write
from kd_dense.errors import ConfigError

#: Of the layout of the files and of the rules by which views are chosen and seeded; raised when one changes.
FORMAT = 1
MANIFEST = 'cache.json'
#: Key of the one entry of a shard's own header.
_ENTRY = 'kd_dense'
#: In a shard of rows: seed and checksums of each record, ``[n, 3]``, 32 bits each (int32, to be read as unsigned).
_CHECKS = 'checks'
CHECK_BYTES = 12
_REPAIR = 'run tools/cache_teacher.py CONFIG again, which writes only what is missing or broken'


@dataclass(frozen=True)
class Manifest:
    """What ``cache.json`` says.

    Args:
        samples, views: of the data set; there are ``samples * views`` records.
        seed: of the views.
        shard_records: records of each shard but the last.
        taps: tap name -> number of its tensors.
        top_k: taps of which a part is kept, see :data:`kd_dense.cache.records.TopK`.
        fingerprint: see :mod:`kd_dense.cache.fingerprint`.
        teacher: what distillers are told about the teacher, see :mod:`kd_dense.cache.teacher`.
        complete: are all shards there?
        shard_bytes: size of each shard of a complete cache.
        store: how all else is kept, ``'fp16'`` or ``'int8'``; see :func:`kd_dense.cache.records.pack`.
        rows: are the tensors of a record rows of those of a shard? They have the same shapes in all records.
        format: see :data:`FORMAT`.
    """

    samples: int
    views: int
    seed: int
    shard_records: int
    taps: dict[str, int]
    top_k: dict[str, tuple[int, ...]]
    fingerprint: dict[str, Any]
    teacher: dict[str, Any]
    complete: bool = False
    shard_bytes: tuple[int, ...] = ()
    store: str = 'fp16'
    rows: bool = False
    format: int = FORMAT

    @property
    def records(self) -> int:
        """Number of records."""
        return self.samples * self.views

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.records / self.shard_records)

    def records_of(self, shard: int) -> range:
        """The records that a shard holds."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.records))

    @property
    def identity(self) -> str:
        """What all shards of one cache have in common; those of another one in the same folder do not count."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ('complete', 'shard_bytes')}
        if not self.rows:  # as before there were any
            del settings['rows']
        if self.store == 'fp16':  # as before there was a choice
            del settings['store']
        return f'{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}'

    def save(self, folder: Path) -> None:
        """Write it, atomically."""
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            ConfigError: there is none, it can not be read, or it is of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ConfigError(
                f'teacher.cache: there is no cache in {folder}; write it with tools/cache_teacher.py CONFIG'
            )
        try:
            values = json.loads(path.read_text())
            written = values['format']
            if written == FORMAT:
                return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'teacher.cache: {path} can not be read ({error}); delete the folder and write the cache again'
            ) from None
        raise ConfigError(
            f'teacher.cache: {folder} has format {written} and this version of kd_dense reads {FORMAT}; delete the '
            'folder and write the cache again'
        )


@dataclass(frozen=True)
class Record:
    """What is kept of one view of one sample.

    Args:
        seed: of the view.
        image: CRC-32 of the augmented image.
        tensors: see :func:`kd_dense.cache.records.pack`.
    """

    seed: int
    image: int
    tensors: dict[str, Tensor]


@dataclass
class StoredCache:
    """A cache on disk, for reading; copies in worker processes open the files anew.

    Args:
        folder: of the cache.
        manifest: of it.
    """

    folder: Path
    manifest: Manifest
    _open: dict[int, tuple[Any, dict]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> StoredCache:
        """Open a cache that is complete.

        Raises:
            ConfigError: there is none, it is not complete, or a shard is missing or cut short.
        """
        folder = Path(folder).expanduser()
        cache = cls(folder, Manifest.load(folder))
        if not cache.manifest.complete:
            there = sum(shard_path(folder, i).is_file() for i in range(cache.manifest.shards))
            raise ConfigError(
                f'teacher.cache: {folder} is not complete, {there} of {cache.manifest.shards} shards are there; finish '
                'it with tools/cache_teacher.py CONFIG'
            )
        for shard, size in enumerate(cache.manifest.shard_bytes):
            path = shard_path(folder, shard)
            if not path.is_file():
                raise ConfigError(f'teacher.cache: {path} is missing; {_REPAIR}')
            if path.stat().st_size != size:
                raise ConfigError(
                    f'teacher.cache: {path} has {path.stat().st_size} bytes and was written with {size}; {_REPAIR}'
                )
        return cache

    def __getstate__(self) -> dict:
        return self.__dict__ | {'_open': {}}

    def read(self, index: int, view: int) -> Record:
        """What is kept of one view of sample ``index``.

        Raises:
            ConfigError: the file was damaged since it was written.
        """
        record = view * self.manifest.samples + index
        shard = record // self.manifest.shard_records
        path = shard_path(self.folder, shard)
        try:
            if shard not in self._open:
                file = safetensors.safe_open(str(path), 'pt')
                header = None if self.manifest.rows else _header(file.metadata(), file.keys())
                self._open[shard] = file, header
            file, header = self._open[shard]
            if header is None:
                tensors, (seed, image, checksum) = _row(file, record - self.manifest.records_of(shard).start)
            else:
                keys, (seed, image, checksum) = header[record]
                # copied: what is mapped would be handed between processes with the whole file
                tensors = {key: file.get_tensor(f'{record}.{key}').clone() for key in keys}
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigError(f'teacher.cache: {path} can not be read ({_short(error)}); {_REPAIR}') from None
        if crc_of(tensors) != checksum:
            raise ConfigError(f'teacher.cache: {path} was damaged, record {record} has another checksum; {_REPAIR}')
        return Record(seed, image, tensors)

    def is_good(self, shard: int) -> bool:
        """Is this shard there, of this cache, and undamaged? Reads all of it."""
        path = shard_path(self.folder, shard)
        if not path.is_file():
            return False
        reader = StoredCache(self.folder, self.manifest)  # maps the file for as long as this takes
        try:
            with safetensors.safe_open(str(path), 'pt') as file:
                if json.loads(file.metadata()[_ENTRY])['cache'] != self.manifest.identity:
                    return False
            for record in self.manifest.records_of(shard):
                view, index = divmod(record, self.manifest.samples)
                reader.read(index, view)
        except (ConfigError, safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
            return False
        return True


def write_shard(folder: Path, manifest: Manifest, shard: int, records: Mapping[int, Record]) -> int:
    """Write one shard, atomically, and return its size.

    Args:
        records: record number -> what to keep of it.
    """
    checks = {n: [r.seed, r.image, crc_of(r.tensors)] for n, r in records.items()}
    entry = {'cache': manifest.identity}
    if manifest.rows:
        ordered = [records[n].tensors for n in manifest.records_of(shard)]
        tensors = {key: torch.stack([one[key] for one in ordered]) for key in ordered[0]}
        numbers = np.array([checks[n] for n in manifest.records_of(shard)], np.uint32)
        tensors[_CHECKS] = torch.from_numpy(numbers.view(np.int32))
    else:
        tensors = {f'{n}.{key}': tensor for n, record in records.items() for key, tensor in record.tensors.items()}
        entry['records'] = checks
    # one entry: safetensors puts several in any order, and equal caches should be equal files
    metadata = {_ENTRY: json.dumps(entry)}
    data = safetensors.torch.save(tensors, metadata)
    with atomic_write(shard_path(folder, shard)) as file:
        file.write(data)
    return len(data)


def shard_path(folder: Path, shard: int) -> Path:
    """Of shard number ``shard``."""
    return folder / f'shard-{shard:05d}.safetensors'


def crc_of(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and contents."""
    checksum = 0
    for key in sorted(tensors):
        checksum = zlib.crc32(key.encode(), checksum)
        checksum = zlib.crc32(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def _header(metadata: Mapping[str, str], names: list[str]) -> dict[int, tuple[list[str], list[int]]]:
    """Record number -> names of its tensors; seed and checksums."""
    found = {int(record): ([], checks) for record, checks in json.loads(metadata[_ENTRY])['records'].items()}
    for name in names:
        record, _, key = name.partition('.')
        found[int(record)][0].append(key)
    return found


def _row(file: Any, row: int) -> tuple[dict[str, Tensor], list[int]]:
    """Tensors of a record; seed and checksums."""
    tensors = {key: file.get_slice(key)[row] for key in file.keys()}  # noqa: SIM118  (no dict)
    return tensors, tensors.pop(_CHECKS).numpy().view(np.uint32).tolist()


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
