"""Writing: planned, resumed, repaired, refused."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from kd_dense import ConfigError, DistillationError
from kd_dense.cache import store
from kd_dense.cache.store import Manifest, StoredCache, shard_path
from kd_dense.cache.views import view_seed
from kd_dense.cache.write import write_cache
from kd_dense.errors import Interrupted
from tests.cache.conftest import OPTIONS, changed
from tests.helpers import tiny
from tests.helpers.processes import in_a_fork


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob('[!.]*'))}


def test_cache__has_every_view_of_every_sample(cache):
    stored = StoredCache.load(cache)
    assert (stored.manifest.samples, stored.manifest.views, stored.manifest.records) == (8, 2, 16)
    assert stored.manifest.shards > 2 and stored.manifest.shards == len(list(Path(cache).glob('*.safetensors')))
    images = set()
    for index in range(8):
        for view in range(2):
            record = stored.read(index, view)
            images.add(record.image)
            assert record.seed == view_seed(0, index, view)
            shapes = {key: tuple(t.shape) for key, t in record.tensors.items()}
            assert shapes == {'t0_0': (7, 12, 12), 't1_0': (64, 2, 2)}
    assert len(images) == 16
    assert [p.name for p in Path(cache).glob('.*')] == ['.lock']


def test_size__is_that_of_the_numbers(cache):
    """2 bytes for each, and a header of one line for each record."""
    manifest = StoredCache.load(cache).manifest
    numbers = 16 * 2 * (7 * 12 * 12 + 64 * 2 * 2)
    assert numbers < sum(manifest.shard_bytes) < numbers * 1.2
    assert manifest.shard_records == OPTIONS.shard_bytes // (numbers // 16)


@pytest.mark.slow
def test_other_batches_and_workers__write_the_same(config, cache, tmp_path):
    write_cache(config, str(tmp_path / 'cache'), replace(OPTIONS, batch_size=1, workers=2))
    ours, theirs = StoredCache.load(tmp_path / 'cache'), StoredCache.load(cache)
    for index in range(8):
        a, b = (c.read(index, 1) for c in (ours, theirs))
        assert (a.seed, a.image) == (b.seed, b.image)
        for key, tensor in a.tensors.items():
            assert np.allclose(tensor.float(), b.tensors[key].float(), rtol=2e-3, atol=1e-5)


def test_complete_cache__is_left_alone(config, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / 'cache')
    before = contents(cache)
    monkeypatch.setattr('kd_dense.cache.write.write_shard', None)
    write_cache(config, str(tmp_path / 'cache'), OPTIONS)
    assert contents(tmp_path / 'cache') == before


# -- interruptions -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of the writer is for."""


def dies_in(folder, shard, how):
    """From now on, ``how()`` is called in the middle of writing that shard, and the temporary file stays behind."""
    original = store.atomic_write

    @contextlib.contextmanager
    def dying(path):
        if path.name != f'shard-{shard:05d}.safetensors':
            with original(path) as file:
                yield file
            return
        (folder / f'.{path.name}.{os.getpid()}.tmp').write_bytes(b'half')
        how()

    store.atomic_write = dying
    return original


def check_goes_on(config, cache, folder, options=OPTIONS):
    assert shard_path(folder, 0).is_file() and not shard_path(folder, 1).exists()
    assert len(list(folder.glob('.shard-00001*'))) == 1
    with pytest.raises(ConfigError, match=r'is not complete, 1 of \d+ shards are there; finish it with'):
        StoredCache.load(folder)
    first = shard_path(folder, 0).stat()
    write_cache(config, str(folder), options)
    assert shard_path(folder, 0).stat().st_mtime_ns == first.st_mtime_ns and not list(folder.glob('.shard*'))
    assert contents(folder) == contents(cache)


def test_writer_that_dies__goes_on_and_ends_like_one_that_did_not(config, cache, tmp_path):
    def die():
        raise Killed

    original = dies_in(tmp_path, 1, die)
    try:
        with pytest.raises(Killed):
            write_cache(config, str(tmp_path), OPTIONS)
    finally:
        store.atomic_write = original
    check_goes_on(config, cache, tmp_path)


@pytest.mark.slow
def test_killed_writer__goes_on_and_ends_like_one_that_was_not(config, cache, tmp_path):
    folder = tmp_path / 'cache'

    def killed():
        folder.mkdir()
        dies_in(folder, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write_cache(config, str(folder), OPTIONS)

    assert in_a_fork(killed, tmp_path / 'errors') == -signal.SIGKILL
    check_goes_on(config, cache, folder)


def test_signal__ends_with_a_sentence_and_keeps_the_shards(config, tmp_path, monkeypatch):
    original = store.write_shard

    def then_stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr('kd_dense.cache.write.write_shard', then_stopped)
    with pytest.raises(
        Interrupted, match=r'SIGTERM; the 1 of \d+ shards that are there are complete, go on with'
    ) as end:
        write_cache(config, str(tmp_path), OPTIONS)
    assert end.value.signal == signal.SIGTERM


def test_full_disk__ends_with_a_sentence_and_keeps_the_shards(config, cache, tmp_path, monkeypatch):
    original = store.atomic_write

    def full(path):
        if path.name == 'shard-00002.safetensors':
            raise OSError(28, 'No space left on device', str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr('kd_dense.cache.store.atomic_write', full)
        with pytest.raises(
            DistillationError, match=r'the disk is full; the 2 of \d+ shards that are there are complete'
        ):
            write_cache(config, str(tmp_path), OPTIONS)
    write_cache(config, str(tmp_path), OPTIONS)
    assert contents(tmp_path) == contents(cache)


def test_no_room__is_known_before_anything_is_written(config, tmp_path, monkeypatch):
    size = 16 * 2 * (7 * 12 * 12 + 64 * 2 * 2)  # of the numbers alone
    with pytest.raises(
        ConfigError, match=rf'would take {size / 1e9:.3g} GB and 1e-05 GB are allowed; .* allow more with --max-gb'
    ):
        write_cache(config, str(tmp_path), replace(OPTIONS, max_bytes=10_000))
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage(1 << 40, 0, (1 << 30) + 10_000))
    with pytest.raises(ConfigError, match=r'are to be written and .* GB left, .*make room, or choose fewer --views'):
        write_cache(config, str(tmp_path), OPTIONS)
    assert not contents(tmp_path)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(cache, tmp_path):
    return Path(shutil.copytree(cache, tmp_path / 'cache'))


def test_damaged_shard__is_noticed_when_it_is_read_and_written_anew(config, cache, copied):
    path = shard_path(copied, 1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit of the last record
    path.write_bytes(data)
    stored = StoredCache.load(copied)
    records = stored.manifest.records_of(1)
    view, index = divmod(records[0], 8)
    stored.read(index, view)
    view, index = divmod(records[-1], 8)
    with pytest.raises(
        ConfigError, match=rf'shard-00001.* was damaged, record {records[-1]} .*tools/cache_teacher\.py'
    ):
        stored.read(index, view)
    others = shard_path(copied, 0).stat().st_mtime_ns
    write_cache(config, str(copied), OPTIONS)
    assert shard_path(copied, 0).stat().st_mtime_ns == others
    assert contents(copied) == contents(cache)


def test_damaged_header__one_sentence(copied):
    path = shard_path(copied, 0)
    data = bytearray(path.read_bytes())
    data[20:30] = b'\xff' * 10
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r'shard-00000\.safetensors can not be read .*tools/cache_teacher\.py'):
        StoredCache.load(copied).read(0, 0)


def test_cut_and_missing_shards__are_noticed_at_the_start(copied):
    path = shard_path(copied, 0)
    os.truncate(path, 1000)
    with pytest.raises(
        ConfigError, match=r'shard-00000\.safetensors has 1000 bytes and was written with \d+; run tools'
    ):
        StoredCache.load(copied)
    path.unlink()
    with pytest.raises(ConfigError, match=r'shard-00000\.safetensors is missing; run tools/cache_teacher\.py'):
        StoredCache.load(copied)


def test_shard_of_another_cache__does_not_count(config, copied):
    cache = StoredCache.load(copied)
    other = StoredCache(copied, replace(cache.manifest, seed=1))
    assert cache.is_good(0) and not other.is_good(0)


@pytest.mark.parametrize(
    'text, sentence',
    [
        ('{', r'cache\.json can not be read'),
        ('{"format": 1}', r'cache\.json can not be read'),
        ('{"format": 99}', r'has format 99 and this version of kd_dense reads 1'),
        (None, r'there is no cache in .*; write it with tools/cache_teacher\.py CONFIG'),
    ],
)
def test_manifest__bad_ones_in_one_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / 'cache.json').write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        StoredCache.load(tmp_path)


def test_header__is_readable_without_kd_dense(cache):
    with safetensors.safe_open(str(shard_path(Path(cache), 0)), 'np') as file:
        records = json.loads(file.metadata()['kd_dense'])['records']
        assert set(records) == {key.split('.')[0] for key in file.keys()}  # noqa: SIM118


# -- refusals ----------------------------------------------------------------------------------------------------------


@TRANSFORMS.register_module()
class DrawsFromItsOwn(BaseTransform):
    """Draws from a generator of its own, as Albumentations does."""

    generator = np.random.default_rng(0)

    def transform(self, results):
        results['img'] = results['img'] + self.generator.integers(0, 3, dtype=np.uint8)
        return results


def test_other_settings__are_not_mixed_into_one_folder(config, copied):
    for options, sentence in (
        (replace(OPTIONS, views=3), r'other settings \(views: 2, not 3\); choose another folder with --cache'),
        (replace(OPTIONS, seed=5), r'other settings \(seed: 0, not 5\)'),
        (replace(OPTIONS, top_k=2), r'top_k'),
    ):
        cfg = config
        with pytest.raises(ConfigError, match=sentence):
            write_cache(cfg, str(copied), options)
    cfg = changed(config, **{'train_dataloader.dataset.pipeline.4.prob': 0.2})
    with pytest.raises(ConfigError, match=r'train_dataloader\.dataset: its pipeline is not the one'):
        write_cache(cfg, str(copied), OPTIONS)


def test_pipelines_that_can_not_be_replayed__one_sentence(config, tmp_path):
    cfg = copy.deepcopy(config)
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='mmengine.DrawsFromItsOwn'))
    with pytest.raises(ConfigError, match=r'dataset: its pipeline gives another image when it is run again .*Albu'):
        write_cache(cfg, str(tmp_path), OPTIONS)
    cfg = copy.deepcopy(config)
    cfg.custom_hooks = [dict(type='mmdet.PipelineSwitchHook', switch_epoch=1, switch_pipeline=[])]
    with pytest.raises(ConfigError, match='custom_hooks: PipelineSwitchHook changes the pipeline during the training'):
        write_cache(cfg, str(tmp_path), OPTIONS)


def test_batch_augmentation__one_sentence(scenes, teacher, tmp_path):
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.detector('RetinaNet'),
        teacher=dict(config=tiny.detector('RetinaNet', width=8)),
        distillers=dict(neck=dict(type='NFD', taps='neck')),
    )
    model['teacher']['checkpoint'] = tiny.saved(model['teacher']['config'], tmp_path / 't.pth')
    augment = dict(type='mmdet.BatchSyncRandomResize', random_size_range=(32, 64), size_divisor=32, interval=1)
    model['student']['data_preprocessor']['batch_augments'] = [augment]
    with pytest.raises(ConfigError, match=r'student\.data_preprocessor\.batch_augments: .*can not replay'):
        write_cache(tiny.detection_run(model, scenes), str(tmp_path / 'cache'), OPTIONS)


@pytest.mark.parametrize(
    'kind, distillers, sentence',
    [
        (
            'FasterRCNN',
            dict(roi=dict(type='RoIKD')),
            r"the tap 'roi_features' of the teacher can not be cached: its RoI",
        ),
        ('DETR', dict(q=dict(type='QueryKD')), r"the tap 'query_logits' of the teacher can not be cached: its tensors"),
    ],
)
def test_taps_that_are_not_per_image__one_sentence(scenes, tmp_path, kind, distillers, sentence):
    build = tiny.deformable_detr if kind == 'DETR' else lambda: tiny.detector(kind)
    student, teacher = build(), build()
    options = dict(config=teacher, checkpoint=tiny.saved(teacher, tmp_path / 't.pth'))
    model = dict(type='kd_dense.Distillation', student=student, teacher=options, distillers=distillers)
    with pytest.raises(ConfigError, match=sentence):
        write_cache(tiny.detection_run(model, scenes), str(tmp_path / 'cache'), OPTIONS)


@pytest.mark.parametrize(
    'distillers, k, sentence',
    [
        (dict(cwd=dict(type='CWD')), 2, r'distillers\.cwd \(CWD\) needs all of the class logits'),
        (dict(nfd=dict(type='NFD')), 2, r"needs a distiller that taps 'logits'"),
        (dict(kd=dict(type='LogitKD')), 7, r'must be from 1 to 6'),
    ],
)
def test_top_k__where_it_can_not_work__one_sentence(config, tmp_path, distillers, k, sentence):
    cfg = copy.deepcopy(config)
    cfg.model.distillers = distillers
    with pytest.raises(ConfigError, match=f'--top-k: .*{sentence}'):
        write_cache(cfg, str(tmp_path), replace(OPTIONS, top_k=k))


def test_no_distillation__one_sentence(config, tmp_path):
    from kd_dense.engine.run import student_alone

    with pytest.raises(ConfigError, match=r'has no model of type kd_dense\.Distillation'):
        write_cache(student_alone(config), str(tmp_path), OPTIONS)


def test_two_writers__one_sentence(config, tmp_path):
    code = (
        'import fcntl, sys; f = open(sys.argv[1], "a+"); fcntl.lockf(f, fcntl.LOCK_EX); print("ready", flush=True); '
        'sys.stdin.read()'
    )
    command = [sys.executable, '-c', code, str(tmp_path / '.lock')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'ready\n'
        with pytest.raises(ConfigError, match=rf'teacher\.cache: another process is writing to {tmp_path}; wait'):
            write_cache(config, str(tmp_path), OPTIONS)
        other.stdin.close()


def test_manifest__comes_back_as_it_was(cache):
    manifest = Manifest.load(Path(cache))
    assert manifest.complete and manifest.identity == replace(manifest, complete=False, shard_bytes=()).identity


def test_config_without_distillation__one_sentence(config, tmp_path):
    plain = changed(config)
    plain.model = plain.model.student
    with pytest.raises(ConfigError, match='no trained teacher to keep the outputs of; give a distillation config'):
        write_cache(plain, str(tmp_path / 'cache'), OPTIONS)
    assert not (tmp_path / 'cache').exists()
