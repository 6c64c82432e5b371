"""Write a teacher cache: plan it, check that it fits, run the teacher, go on where an earlier run ended."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kd_dense import checkpoint as checkpoints
from kd_dense.cache import fingerprint
from kd_dense.cache.live import LiveOutputs, check_hooks, crc_of_image
from kd_dense.cache.records import pack
from kd_dense.cache.store import MANIFEST, Manifest, Record, StoredCache, shard_path, write_shard
from kd_dense.cache.teacher import write_description
from kd_dense.cache.views import ViewBank, view_seed
from kd_dense.description import Logits
from kd_dense.engine.run import _toolbox, check_data, is_distillation, is_yolo
from kd_dense.errors import ConfigError, DistillationError, Interrupted
from kd_dense.failures import _NO_ROOM, as_sentences
from kd_dense.models.distillation import MODEL_KEYS, Distillation, check_teacher
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
        max_bytes: the cache may not become larger.
        shard_bytes: about the size of one file: what is lost at most when the writer is killed.
        batch_size: images that the teacher sees at once.
        workers: processes that run the pipeline.
        progress: show a bar.
    """

    views: int = 4
    seed: int = 0
    top_k: int | None = None
    max_bytes: int = 100 * 10**9
    shard_bytes: int = 1 << 28
    batch_size: int = 8
    workers: int = 0
    progress: bool = True


def write_cache(cfg: Config, folder: str, options: WriteOptions = WriteOptions()) -> Manifest:
    """Run the teacher of a config over all views of its training set, and keep what its taps give in ``folder``.

    Where a cache of the same settings is there, only shards that are missing or damaged are written.

    Raises:
        ConfigError: a config, a pipeline or a tap that can not be cached, another cache in ``folder``, or no room.
        DistillationError: the disk became full, or an output is not finite; the shards that are there are complete.
        Interrupted: by SIGINT or SIGTERM; likewise.
    """
    if is_yolo(cfg):
        raise ConfigError(
            'teacher.cache: a cache can be written for MMSegmentation and MMDetection only; the mosaics of Ultralytics '
            'depend on which images were loaded before, so its views can not be replayed'
        )
    if not is_distillation(cfg):
        raise ConfigError(f'model: {cfg.filename or "the config"} has no model of type kd_dense.Distillation')
    check_hooks(cfg)
    check_data(cfg, ('train_dataloader',))
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with _owned(path), stop_signals(), as_sentences(path):
        checkpoints.remove_leftovers(path)
        return _Writer(cfg, path, options).run()


class _Writer:
    """One run of :func:`write_cache`, in a folder that it owns."""

    def __init__(self, cfg: Config, folder: Path, options: WriteOptions) -> None:
        self.folder, self.options = folder, options
        scope = _toolbox(cfg)
        init_default_scope(scope or 'mmengine')
        self.bank = ViewBank(fingerprint.plain_dataset(cfg), options.views, options.seed)
        if len(self.bank) == 0:
            raise ConfigError('train_dataloader.dataset: has no images')
        there = self._earlier(cfg)
        self.model = _distillation(cfg, scope).to(get_device())
        self.live = LiveOutputs(self.model)
        self.top_k = self._kept_classes()
        self.records = _Records(self.bank)
        self.records.check()
        self.live.check(self.bank.replay(0, 0))
        self.bytes, self.manifest = self._plan(cfg)
        if there is not None:
            self._check_equal(there, taps=self.manifest.taps, top_k=self.manifest.top_k)
            self.manifest = replace(there, complete=False, shard_bytes=())

    # -- planning ------------------------------------------------------------------------------------------------------

    def _kept_classes(self) -> dict[str, tuple[int, int]]:
        """Tap name -> classes to keep of each position, and all classes."""
        k = self.options.top_k
        if k is None:
            return {}
        names = [n for n in self.live.names if n.split(':')[0] in ('logits', 'branch_logits')]
        logits = self.model.distillers.description('teacher').logits
        if not names or not isinstance(logits, Logits) or (logits.activation, logits.layout) != ('softmax', 'map'):
            raise ConfigError(
                "--top-k: needs a distiller that taps 'logits' of a teacher with a softmax over the classes of each "
                'position; leave it out'
            )
        for owner, method in self.model.distillers.methods.items():
            taps = [tap for pair in method.taps.values() for tap in pair.teacher]
            if not method.softmax_only and set(taps) & set(names):
                raise ConfigError(
                    f'--top-k: distillers.{owner} ({type(method).__name__}) reads more of the class logits than their '
                    'softmax, which few classes can not give back; leave it out'
                )
        if not 1 <= k < logits.num_classes:
            raise ConfigError(f'--top-k: must be from 1 to {logits.num_classes - 1}, fewer than all classes, not {k}')
        return dict.fromkeys(names, (k, logits.num_classes))

    def _plan(self, cfg: Config) -> tuple[float, Manifest]:
        """Bytes of a record, and the manifest."""
        total = len(self.bank) * self.bank.views
        numbers = sorted({i * total // min(8, total) for i in range(min(8, total))})  # spread over images and views
        packed = [self._pack([self.records[n]])[n].tensors for n in numbers]
        size = sum(t.numel() * t.element_size() for tensors in packed for t in tensors.values()) / len(packed)
        values, canvas = self.model.distillers.dry_forward('teacher')
        shapes = {name: [t.shape for t in tensors] for name, tensors in values.items()}
        manifest = Manifest(
            samples=len(self.bank),
            views=self.bank.views,
            seed=self.bank.seed,
            shard_records=max(1, min(total, int(self.options.shard_bytes / size))),
            taps={name: len(shapes[name]) for name in self.live.names},
            top_k={name: list(kept) for name, kept in self.top_k.items()},
            fingerprint={**fingerprint.fingerprint(cfg), 'images': fingerprint.images(self.bank.dataset)},
            teacher=write_description(
                self.model.distillers.description('teacher'),
                (self.model.teacher_meta.get('dataset_meta') or {}).get('classes'),
                shapes,
                canvas,
            ),
        )
        return size, manifest

    def _earlier(self, cfg: Config) -> Manifest | None:
        """That of the cache in the folder, if there is one; found out before the teacher is built."""
        if not (self.folder / MANIFEST).is_file():
            return None
        there = Manifest.load(self.folder)
        now = {**fingerprint.fingerprint(cfg), 'images': fingerprint.images(self.bank.dataset)}
        fingerprint.check(there.fingerprint, now, self.folder)
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
        remedy = 'choose fewer --views, smaller taps, or --top-k for class logits'
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
        manifest, size = self.manifest, self.options.batch_size
        batches = [
            list(records[i : i + size])
            for records in map(manifest.records_of, missing)
            for i in range(0, len(records), size)
        ]
        loader = DataLoader(self.records, batch_sampler=batches, num_workers=self.options.workers, collate_fn=_as_it_is)
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
        keep = {name: k for name, (k, _) in self.top_k.items()}
        packed = {}
        for (number, image, _), output in zip(batch, outputs, strict=True):
            view, index = divmod(number, len(self.bank))
            packed[number] = Record(view_seed(self.bank.seed, index, view), image, pack(output, keep))
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
        return number, crc_of_image(sample), sample

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
                    'train_dataloader.dataset.pipeline: gives another image when it is run again from the same random '
                    'state, so its views can not be replayed; leave out what keeps images or draws from a generator of '
                    'its own (CachedMosaic, Albu, ...), or train without teacher.cache'
                )


def _as_it_is(batch: list) -> list:
    return batch


def _distillation(cfg: Config, scope: str) -> Distillation:
    """The model of a config, with the live teacher."""
    settings = {key: cfg.model[key] for key in MODEL_KEYS if key in cfg.model}
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    if isinstance(settings['student'], dict):
        settings['student'] = {'_scope_': scope, **settings['student']}
    settings['teacher'] = dict(check_teacher(settings['teacher']), cache=None)
    return Distillation(**settings, data_preprocessor=preprocessor)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Let no other writer in."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except ConfigError:
            raise ConfigError(f'teacher.cache: another process is writing to {folder}; wait until it ends') from None
        yield
