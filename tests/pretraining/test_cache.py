"""The soft labels on the disk: what the live teacher says, found again, and nothing of another teacher."""

import json
import shutil
import zlib
from dataclasses import replace

import pytest
import safetensors
import torch

from kd_dense import ConfigError
from kd_dense.cache import fingerprint
from kd_dense.cache.records import from_top_k
from kd_dense.cache.store import Manifest, StoredCache
from kd_dense.cache.views import view_seed
from kd_dense.cache.write import write_cache
from kd_dense.pretraining.source import ClassifierSource, fingerprint_of
from tests.pretraining import teachers
from tests.pretraining.conftest import OPTIONS, cache_folder, changed


@pytest.fixture
def stored(cached):
    return StoredCache.load(cache_folder(cached))


def test_manifest(stored):
    manifest = stored.manifest
    assert (manifest.samples, manifest.views, manifest.rows, manifest.complete) == (8, 2, True, True)
    assert manifest.top_k == {'logits': [100, 150]}
    assert manifest.shards > 1  # 4 kB each


def test_shard__is_rows_of_3_bytes_a_class(stored):
    """150 classes fit a byte: 2 bytes and 1 for each of 100, and 12 of seed and checksums."""
    sizes = stored.manifest.shard_bytes
    records = [len(stored.manifest.records_of(i)) for i in range(len(sizes))]
    with safetensors.safe_open(str(stored.folder / 'shard-00000.safetensors'), 'pt') as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()['kd_dense']) == {'cache': stored.manifest.identity}
    assert shapes == {'t0_0_p': [records[0], 100], 't0_0_c': [records[0], 100], 'checks': [records[0], 3]}
    header = {size - 312 * n for size, n in zip(sizes, records, strict=True)}
    assert len(header) <= 2 and max(header) < 400  # the same whatever the number of records, up to its digits


def test_record__is_what_the_live_teacher_says(cached, stored):
    source = ClassifierSource(cached, views=2, seed=0)
    _, live, _ = source.build()
    for index, view in ((0, 0), (7, 1), (3, 1)):
        record = stored.read(index, view)
        assert record.seed == view_seed(0, index, view)
        (logits,) = live([source.bank.replay(index, view)])[0]['logits']
        exact = logits.softmax(0)
        p, c = record.tensors['t0_0_p'], record.tensors['t0_0_c'].long()
        assert torch.equal(p, p.sort(descending=True).values) and len(c.unique()) == 100
        assert torch.allclose(p.float(), exact[c], atol=5e-4)
        whole = from_top_k(p[None], record.tensors['t0_0_c'][None], 150)[0].exp()
        assert float(whole.sum()) == pytest.approx(1, abs=1e-6) and float(whole.min()) > 0
        assert float((whole - exact).abs().sum()) / 2 < 0.02


def test_views__differ(stored):
    records = [stored.read(index, view) for index in range(8) for view in range(2)]
    assert len({record.image for record in records}) == 16 and len({record.seed for record in records}) == 16


def test_second_writer__only_replaces_what_is_damaged(cached, tmp_path):
    cfg = changed(cached, **{'model.teacher.cache': str(tmp_path / 'cache')})
    folder = shutil.copytree(cache_folder(cached), tmp_path / 'cache')
    before = {path.name: path.read_bytes() for path in folder.glob('shard-*')}
    damaged, kept = sorted(folder.glob('shard-*'))[:2]
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r'was damaged, record \d+ has another checksum'):
        for record in range(16):
            StoredCache.load(folder).read(record % 8, record // 8)
    write_cache(cfg, str(folder), OPTIONS)
    assert {path.name: path.read_bytes() for path in folder.glob('shard-*')} == before
    assert kept.stat().st_mtime_ns == stamp


def test_all_classes__can_be_kept(config, tmp_path):
    manifest = write_cache(config, str(tmp_path), replace(OPTIONS, views=1, top_k=150))
    record = StoredCache.load(tmp_path).read(0, 0).tensors
    assert manifest.top_k == {'logits': [150, 150]}
    whole = from_top_k(record['t0_0_p'][None], record['t0_0_c'][None], 150).exp()
    assert whole.isfinite().all() and float(whole.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('k', [0, 151])
def test_k__of_which_there_are_not_so_many__one_sentence(config, tmp_path, k):
    with pytest.raises(ConfigError, match=rf'--top-k: must be from 1 to the 150 classes of the teacher, not {k}'):
        write_cache(config, str(tmp_path), replace(OPTIONS, top_k=k))


def test_int8_and_anchors__are_not_for_probabilities__one_sentence(config, tmp_path):
    with pytest.raises(ConfigError, match=r'--store: the probabilities of a classifier are kept in fp16'):
        write_cache(config, str(tmp_path), replace(OPTIONS, store='int8'))
    with pytest.raises(ConfigError, match=r'--anchors: is for detectors, and the teacher is a classifier'):
        write_cache(config, str(tmp_path), replace(OPTIONS, anchors=5))


def test_another_teacher_in_the_same_folder__one_sentence(cached, tmp_path):
    other = teachers.saved(tmp_path / 'other.pth', seed=1)
    cfg = changed(cached, **{'model.teacher.checkpoint': other})
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: the file has other contents than the one'):
        write_cache(cfg, str(cache_folder(cached)), OPTIONS)


def test_pipeline_that_does_not_fit__one_sentence(config, tmp_path):
    cfg = changed(config)
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [*pipeline[:2], dict(type='mmseg.PackSegInputs')]
    with pytest.raises(ConfigError, match=r"pipeline: must end with dict\(type='kd_dense\.PackImage'\)"):
        write_cache(cfg, str(tmp_path), OPTIONS)
    sizes = dict(type='RandomChoiceResize', scales=[(32, 32), (40, 40)], keep_ratio=False)
    cfg.train_dataloader.dataset.pipeline = [pipeline[0], sizes, pipeline[2]]
    with pytest.raises(ConfigError, match=r'gives images of (32 x 32|40 x 40) and (32 x 32|40 x 40) pixels; crop or'):
        write_cache(cfg, str(tmp_path), OPTIONS)


def test_no_images__one_sentence(config, tmp_path):
    (tmp_path / 'empty').mkdir()
    cfg = changed(
        config,
        **{
            'train_dataloader.dataset.data_root': str(tmp_path),
            'train_dataloader.dataset.data_prefix.img_path': 'empty',
        },
    )
    with pytest.raises(ConfigError, match=r'empty'):
        write_cache(cfg, str(tmp_path / 'cache'), OPTIONS)


def test_old_manifest__has_no_rows_and_the_same_identity(stored):
    """A cache that was written before there were rows is read, and its shards are its own."""
    values = json.loads((stored.folder / 'cache.json').read_text())
    del values['rows']
    manifest = Manifest(**values)
    assert not manifest.rows and manifest.identity != stored.manifest.identity
    names = ['samples', 'views', 'seed', 'shard_records', 'taps', 'top_k', 'fingerprint', 'teacher', 'format']
    settings = {name: values[name] for name in names}
    assert manifest.identity == f'{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}'


def test_student__is_no_part_of_the_fingerprint(cached):
    other = changed(
        cached, **{'model.student.backbone.base_channels': 8, 'model.student.data_preprocessor.mean': [1, 2, 3]}
    )
    fingerprint.check(fingerprint_of(cached), fingerprint_of(other), cache_folder(cached), 'data')
    assert fingerprint_of(cached) == fingerprint_of(other)
