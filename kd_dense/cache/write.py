"""Write a teacher cache: plan it, check that it fits, run the teacher, go on where an earlier run ended."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kd_dense import checkpoint as checkpoints
from kd_dense.cache import fingerprint
from kd_dense.cache.acceptance import accepted, check_readers
from kd_dense.cache.live import crc_of_image, difference
from kd_dense.cache.records import pack, size_of, unpack
from kd_dense.cache.source import MMEngineSource, Source
from kd_dense.cache.store import CHECK_BYTES, MANIFEST, Manifest, Record, StoredCache, shard_path, write_shard
from kd_dense.cache.teacher import write_description
from kd_dense.cache.verify import TOLERANCE
from kd_dense.cache.views import ViewBank, view_seed
from kd_dense.description import CLASS_TAPS, Logits
from kd_dense.engine.run import is_pretraining, is_yolo
from kd_dense.errors import ConfigError, DistillationError, Interrupted
from kd_dense.failures import _NO_ROOM, as_sentences
from kd_dense.run_lock import locked
from kd_dense.stopping import name_of, requested, stop_signals

#: Room on the disk that is left alone, in bytes.
RESERVE = 1 << 30


@dataclass(frozen=True)
class WriteOptions:
    """How a cache is written.

    Args:
        views: augmented versions of each sample.
        seed: of the views.
        top_k: keep so many classes of the class logits at every position; ``None``: keep all.
        anchors: of a dense sigmoid head, keep so many anchors of each image; ``None``: keep all.
        store: how all else is kept: ``'fp16'``, or ``'int8'`` for half the size.
        max_bytes: the cache may not become larger.
        shard_bytes: about the size of one file: what is lost at most when the writer is killed.
        batch_size: images that the teacher sees at once; ``None``: as many as the training's batch.
        workers: processes that run the pipeline; ``None``: as many as in the training.
        progress: show a bar.
    """

    views: int = 4
    seed: int = 0
    top_k: int | None = None
    anchors: int | None = None
    store: str = 'fp16'
    max_bytes: int = 100 * 10**9
    shard_bytes: int = 1 << 28
    batch_size: int | None = None
    workers: int | None = None
    progress: bool = True


def write_cache(cfg: Config, folder: str, options: WriteOptions = WriteOptions()) -> Manifest:
    """Run the teacher of a config over all views of its training set, and keep what its taps give in ``folder``.

    Where a cache of the same settings is there, only shards that are missing or damaged are written.

    Raises:
        ConfigError: a config, a pipeline or a tap that can not be cached, another cache in ``folder``, or no room.
        DistillationError: the disk became full, or an output is not finite; the shards that are there are complete.
        Interrupted: by SIGINT or SIGTERM; likewise.
    """
    path = Path(folder).expanduser()
    with closing(_source(cfg, options)) as source:
        path.mkdir(parents=True, exist_ok=True)
        with _owned(path), stop_signals(), as_sentences(path):
            checkpoints.remove_leftovers(path)
            return _writer(cfg)(source, path, options).run()


def _source(cfg: Config, options: WriteOptions) -> Source:
    if is_yolo(cfg):
        from kd_dense.yolo.cache import YoloSource  # needs Ultralytics

        return YoloSource(cfg, options.views, options.seed)
    if is_pretraining(cfg):
        from kd_dense.pretraining.source import ClassifierSource  # needs this package

        return ClassifierSource(cfg, options.views, options.seed)
    return MMEngineSource(cfg, options.views, options.seed)


def _writer(cfg: Config) -> type[Writer]:
    if is_pretraining(cfg):
        from kd_dense.pretraining.write import LabelWriter  # needs this module

        return LabelWriter
    return Writer


class Writer:
    """One run of :func:`write_cache`, in a folder that it owns."""

    #: Most records of a shard; see ``Manifest.rows``.
    shard_records = sys.maxsize
    rows = False

    def __init__(self, source: Source, folder: Path, options: WriteOptions) -> None:
        self.folder, self.options, self.bank = folder, options, source.bank
        self.batch_size = options.batch_size or source.batch_size
        self.workers = source.workers if options.workers is None else options.workers
        if len(self.bank) == 0:
            raise ConfigError(f'{self.bank.key}: has no images')
        found = source.fingerprint()
        there = self._earlier(found)
        self.distillers, self.live, classes = source.build()
        self.top_k = self._kept_classes()
        self.records = _Records(self.bank)
        self.records.check()
        self.live.check(self.bank.replay(0, 0))
        self.bytes, self.manifest = self._plan(found, classes)
        if there is not None:
            self._check_equal(there, **{name: getattr(self.manifest, name) for name in ('taps', 'top_k', 'store')})
            self.manifest = replace(there, complete=False, shard_bytes=())

    # -- planning ------------------------------------------------------------------------------------------------------

    def _kept_classes(self) -> dict[str, tuple[int, ...]]:
        """Of the taps of which a part is to be kept, see :data:`~kd_dense.cache.records.TopK`."""
        k, anchors = self.options.top_k, self.options.anchors
        if k is None and anchors is None:
            return {}
        option = '--top-k' if anchors is None else '--anchors'
        names = [n for n in self.live.names if n.split(':')[0] in CLASS_TAPS]
        logits = self.distillers.description('teacher').logits
        if not names or not isinstance(logits, Logits) or logits.layout != 'map':
            raise ConfigError(
                f"{option}: needs a distiller that taps 'logits' of a teacher that has them for each position; leave "
                'it out'
            )
        check_readers(self.distillers, names, option)
        if logits.activation == 'sigmoid':
            return dict.fromkeys(names, self._kept_anchors(logits.num_classes))
        if anchors is not None:
            raise ConfigError(
                '--anchors: is for sigmoid heads, and that of this teacher has a softmax over the classes; use --top-k'
            )
        shapes = self.distillers.dry_forward('teacher')[0]
        if any(x.shape[1] != logits.num_classes for name in names for x in shapes[name]):
            raise ConfigError('--top-k: the softmax head of this teacher has several anchors per cell; leave it out')
        if not 1 <= k < logits.num_classes:
            raise ConfigError(f'--top-k: must be from 1 to {logits.num_classes - 1}, fewer than all classes, not {k}')
        return dict.fromkeys(names, (k, logits.num_classes))

    def _kept_anchors(self, num_classes: int) -> tuple[int, int, int]:
        k, anchors = self.options.top_k, self.options.anchors
        if anchors is None:
            raise ConfigError(
                '--top-k: the classes of this sigmoid head do not share one probability, so few of them say nothing '
                'about the others; add --anchors, such as --anchors 300, or leave it out'
            )
        if anchors < 1:
            raise ConfigError(f'--anchors: must be at least 1, not {anchors}')
        k = num_classes if k is None else k
        if not 1 <= k <= num_classes:
            raise ConfigError(f'--top-k: must be from 1 to the {num_classes} classes of the teacher, not {k}')
        return k, num_classes, anchors

    def _plan(self, found: dict, classes: Iterable[str] | None) -> tuple[float, Manifest]:
        """Bytes of a record, and the manifest."""
        total = len(self.bank) * self.bank.views
        numbers = sorted({i * total // min(8, total) for i in range(min(8, total))})  # spread over images and views
        records = [self.records[n] for n in numbers]
        packed = [self._pack([record])[record[0]].tensors for record in records]
        samples = [sample for _, _, sample in records]
        if self.top_k and not self.rows:  # soft labels are what is trained on, not an approximation of something
            self._check_kept(samples)
        if self.options.store != 'fp16':
            self._check_digits(samples)
        size = sum(map(size_of, packed)) / len(packed)
        size += CHECK_BYTES * self.rows
        taps, teacher = self._about_teacher(classes)
        manifest = Manifest(
            samples=len(self.bank),
            views=self.bank.views,
            seed=self.bank.seed,
            shard_records=max(1, min(total, self.shard_records, int(self.options.shard_bytes / size))),
            taps=taps,
            top_k={name: list(kept) for name, kept in self.top_k.items()},
            fingerprint=found,
            teacher=teacher,
            store=self.options.store,
            rows=self.rows,
        )
        return size, manifest

    def _check_kept(self, samples: Sequence[dict]) -> None:
        """What training sees of it that a part of the class logits is kept.

        Raises:
            ConfigError: more than is accepted.
        """
        options = {'--anchors': self.options.anchors, '--top-k': self.options.top_k}
        given = ' '.join(f'{name} {value}' for name, value in options.items() if value is not None)
        part = whole = 0
        for sample in samples:
            (output,) = self.live([sample])
            output = {name: output[name] for name in self.top_k}
            part += size_of(pack(output, self.top_k))
            whole += size_of(pack(output, {}, self.options.store))
        if part >= whole:
            raise ConfigError(
                f'{given}: takes {part} bytes for {len(samples)} views, and all class logits take {whole}; keep less, '
                'or leave it out'
            )
        for sentence in accepted(self.distillers, self.live, samples, self.top_k, given):
            print_log(sentence, 'current')

    def _check_digits(self, samples: Sequence[dict]) -> None:
        """What is lost in 8 bits, of each tap.

        Raises:
            ConfigError: more than is accepted of a cache.
        """
        worst = dict.fromkeys((n for n in self.live.names if n not in self.top_k), 0.0)
        for sample in samples:
            (output,) = self.live([sample])
            for name in worst:
                outputs = {name: output[name]}
                back = unpack([pack(outputs, {}, self.options.store)], {name: len(output[name])}, {})[name]
                found = (difference(a[0], b.cpu()) for a, b in zip(back, output[name], strict=True))
                worst[name] = max(worst[name], *found)
        for name, found in worst.items():
            print_log(f'--store {self.options.store} changes {name} by {found:.2%} of its length', 'current')
            if not found <= TOLERANCE:
                raise ConfigError(
                    f'--store {self.options.store}: changes the outputs of the teacher at {name!r} by {found:.1%} of '
                    f'their length, and {TOLERANCE:.0%} are accepted; leave it out, which keeps them in fp16'
                )

    def _about_teacher(self, classes: Iterable[str] | None) -> tuple[dict[str, int], dict[str, Any]]:
        """Tap name -> number of its tensors; and what distillers are told about the teacher."""
        values, canvas = self.distillers.dry_forward('teacher')
        shapes = {name: [t.shape for t in tensors] for name, tensors in values.items()}
        teacher = write_description(self.distillers.description('teacher'), classes, shapes, canvas)
        return {name: len(shapes[name]) for name in self.live.names}, teacher

    def _earlier(self, found: dict) -> Manifest | None:
        """That of the cache in the folder, if there is one; found out before the teacher is built."""
        if not (self.folder / MANIFEST).is_file():
            return None
        there = Manifest.load(self.folder)
        fingerprint.check(there.fingerprint, found, self.folder, self.bank.key)
        self._check_equal(there, samples=len(self.bank), views=self.bank.views, seed=self.bank.seed)
        return there

    def _check_equal(self, there: Manifest, **settings: object) -> None:
        for name, ours in settings.items():
            theirs = getattr(there, name)
            if ours != theirs:
                raise ConfigError(
                    f'teacher.cache: {self.folder} holds a cache with other settings ({name}: {theirs}, not {ours}); '
                    'choose another folder with --cache, or delete that one'
                )

    def _check_room(self, missing: list[int]) -> None:
        whole = self.bytes * self.manifest.records
        needed = self.bytes * sum(len(self.manifest.records_of(shard)) for shard in missing)
        free = shutil.disk_usage(self.folder).free
        print_log(
            f'{self.manifest.records} views ({self.manifest.views} of each of {self.manifest.samples} samples) of '
            f'{self.bytes / 1e6:.3g} MB: {whole / 1e9:.3g} GB, of which {needed / 1e9:.3g} GB are to be written; '
            f'{free / 1e9:.3g} GB are free',
            'current',
        )
        remedy = 'choose fewer --views, smaller taps, --store int8, or --top-k or --anchors for class logits'
        if whole > self.options.max_bytes:
            raise ConfigError(
                f'teacher.cache: would take {whole / 1e9:.3g} GB and {self.options.max_bytes / 1e9:.3g} GB are '
                f'allowed; {remedy}, or allow more with --max-gb'
            )
        if needed > free - RESERVE:
            raise ConfigError(
                f'teacher.cache: {needed / 1e9:.3g} GB are to be written and {self.folder} has {free / 1e9:.3g} GB '
                f'left, of which {RESERVE / 1e9:.3g} GB stay free; make room, or {remedy}'
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def run(self) -> Manifest:
        """Write what is missing."""
        missing = self._missing()
        self._check_room(missing)
        try:
            if missing:
                self.manifest.save(self.folder)  # no longer complete, before anything is removed
            for shard in missing:
                shard_path(self.folder, shard).unlink(missing_ok=True)
            self._write(missing)
            sizes = (shard_path(self.folder, shard).stat().st_size for shard in range(self.manifest.shards))
            manifest = replace(self.manifest, complete=True, shard_bytes=tuple(sizes))
            manifest.save(self.folder)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise DistillationError(
                f'teacher.cache: {self.folder} can not be written, {_NO_ROOM[error.errno]}; {self._state()}, so make '
                'room and run the same command again'
            ) from error
        except RuntimeError as error:
            if requested() is None:
                raise
            raise self._interrupted() from error  # the signal ended the worker processes too
        return manifest

    def _missing(self) -> list[int]:
        """The shards that are not there, or damaged; all that are there are read."""
        cache = StoredCache(self.folder, self.manifest)
        there = [shard for shard in range(self.manifest.shards) if shard_path(self.folder, shard).is_file()]
        quiet = not self.options.progress or not there
        bar = tqdm(there, desc='checking what is there', unit='file', file=sys.stderr, disable=quiet)
        good = {shard for shard in bar if cache.is_good(shard)}
        return [shard for shard in range(self.manifest.shards) if shard not in good]

    def _write(self, missing: list[int]) -> None:
        manifest, size = self.manifest, self.batch_size
        batches = [
            list(records[i : i + size])
            for records in map(manifest.records_of, missing)
            for i in range(0, len(records), size)
        ]
        loader = DataLoader(self.records, batch_sampler=batches, num_workers=self.workers, collate_fn=_as_it_is)
        left, written = list(missing), {}
        done = manifest.records - sum(map(len, batches))
        with tqdm(
            total=manifest.records,
            initial=done,
            desc='teacher',
            unit='view',
            file=sys.stderr,
            disable=not self.options.progress,
        ) as bar:
            for batch in loader:
                if requested() is not None:
                    raise self._interrupted()
                written |= self._pack(batch)
                bar.update(len(batch))
                if len(written) == len(manifest.records_of(left[0])):
                    write_shard(self.folder, manifest, left.pop(0), written)
                    written = {}

    def _pack(self, batch: list[tuple[int, int, dict]]) -> dict[int, Record]:
        """Record number -> what is kept of it."""
        outputs = self.live([sample for _, _, sample in batch])
        packed = {}
        for (number, image, _), output in zip(batch, outputs, strict=True):
            view, index = divmod(number, len(self.bank))
            packed[number] = Record(
                view_seed(self.bank.seed, index, view), image, pack(output, self.top_k, self.options.store)
            )
        return packed

    def _state(self) -> str:
        there = sum(shard_path(self.folder, shard).is_file() for shard in range(self.manifest.shards))
        return f'the {there} of {self.manifest.shards} shards that are there are complete'

    def _interrupted(self) -> Interrupted:
        number = requested()
        return Interrupted(f'{name_of(number)}; {self._state()}, go on with the same command', number)


class _Records(Dataset):
    """Record number -> the number, the checksum of the image, and the sample.

    Args:
        bank: of the views.
    """

    def __init__(self, bank: ViewBank) -> None:
        self.bank = bank

    def __getitem__(self, number: int) -> tuple[int, int, dict]:
        view, index = divmod(number, len(self.bank))
        sample = self.bank.replay(index, view)
        return number, crc_of_image(self.bank.image(sample)), sample

    def check(self) -> None:
        """Do views come out alike when they are replayed, in another order and with others in between?

        Raises:
            ConfigError: they do not.
        """
        count = min(3, len(self.bank))
        first = {number: self[number][1] for number in range(count)}
        for number in reversed(range(count)):
            if self[number][1] != first[number]:
                raise ConfigError(
                    f'{self.bank.key}: its pipeline gives another image when it is run again from the same random '
                    'state, so its views can not be replayed; leave out what keeps images or draws from a generator of '
                    'its own (CachedMosaic, Albu, ...), or train without teacher.cache'
                )


def _as_it_is(batch: list) -> list:
    return batch


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Let no other writer in."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except ConfigError:
            raise ConfigError(f'teacher.cache: another process is writing to {folder}; wait until it ends') from None
        yield
