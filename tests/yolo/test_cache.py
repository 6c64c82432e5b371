"""A teacher cache for YOLO: exact views, the losses of the live teacher, and every mismatch in one sentence."""

import gc
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.utils.data import DataLoader
from ultralytics.data.augment import Albumentations, Mosaic
from ultralytics.nn.tasks import DetectionModel

from kd_dense import ConfigError
from kd_dense.cache import cache_of, store
from kd_dense.cache.records import size_of
from kd_dense.cache.store import StoredCache, shard_path
from kd_dense.cache.views import ViewSampler
from kd_dense.cache.write import WriteOptions, write_cache
from kd_dense.yolo.cache import YoloSource
from kd_dense.yolo.config import read
from kd_dense.yolo.run import _arguments, _on_views_of, train
from kd_dense.yolo.trainer import DistillationTrainer, StudentTrainer
from kd_dense.yolo.views import YoloViews, _all_transforms
from tests.cache.conftest import with_other_classes
from tests.cache.test_write import Killed, check_goes_on, contents, dies_in
from tests.yolo.helpers import CLASSES, FAST, build, save_model, write_data

ROOT = Path(__file__).parents[2]
#: Eight images, two views.
OPTIONS = WriteOptions(views=2, shard_bytes=40_000, progress=False)
#: All that draws, of images and of numbers.
#: Slowly, so that the digits that fp16 loses do not grow.
TRAIN = dict(FAST, epochs=2, lr0=1e-4, close_mosaic=0, mosaic=0.5, mixup=0.5, cutmix=0.3, degrees=10.0, flipud=0.5)
#: Of which there are objects of the first two.
MORE_CLASSES = (*CLASSES, 'triangle', 'star', 'cross', 'ring')
DISTILLERS = dict(logits=dict(type='LogitKD'), mimic=dict(type='FeatureMimic', taps='model.16'))


@pytest.fixture(scope='module')
def config(data, student_yaml, teacher_file) -> Config:
    return Config(
        dict(
            student=student_yaml(),
            teacher=dict(checkpoint=teacher_file()),
            distillers=DISTILLERS,
            data=str(data),
            train=TRAIN,
        )
    )


@pytest.fixture(scope='module')
def cache(config, tmp_path_factory) -> str:
    """A complete cache; not to be changed."""
    folder = str(tmp_path_factory.mktemp('yolo_cache') / 'cache')
    write_cache(config, folder, OPTIONS)
    return folder


def changed(config, **changes):
    cfg = Config(config.to_dict())
    cfg.merge_from_dict(changes)
    return cfg


@pytest.fixture
def cached(config, cache) -> Config:
    return changed(config, **{'teacher.cache': cache})


def losses(monkeypatch, cfg, folder, **arguments):
    """The loss items of every batch of a training, one row each."""
    rows = []
    original = DistillationTrainer.run_callbacks

    def record(self, event):
        if event == 'on_train_batch_end':
            rows.append([float(v) for v in self.loss_items.values()])
        original(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, 'run_callbacks', record)
        train(cfg, folder, **arguments)
    return np.array(rows)


def started(cfg, folder):
    """The trainer of a config, as it is before its first iteration."""
    settings = read(cfg)
    path = folder / 'config.py'
    folder.mkdir(exist_ok=True)
    path.write_text(cfg.dump())
    trainer = DistillationTrainer(overrides={**_arguments(settings, folder), 'distill_model': str(path)})
    trainer._setup_train()
    return trainer


# -- views -------------------------------------------------------------------------------------------------------------


def test_views__depend_on_nothing_but_their_seed(config):
    source = YoloSource(config, views=3, seed=1)
    bank = source.bank
    assert any(isinstance(t, Mosaic) for t in _all_transforms(bank.dataset.transforms))
    first = [bank[i] for i in range(24)]
    for i in (23, 0, 8, 8, 5, 16):
        again = bank[i]
        for key in ('img', 'cls', 'bboxes'):
            assert torch.equal(again[key], first[i][key])
    assert len({sample['img'].numpy().tobytes() for sample in first}) == 24
    source.close()


def test_views__are_alike_in_worker_processes(config):
    source = YoloSource(config, views=2, seed=0)
    items = [[9, 3], [0, 15], [4]]
    loader = DataLoader(
        source.bank, batch_sampler=items, num_workers=2, multiprocessing_context='fork', collate_fn=lambda batch: batch
    )
    for batch, numbers in zip(loader, items, strict=True):
        for found, number in zip(batch, numbers, strict=True):
            here = source.bank[number]
            assert all(torch.equal(found[key], here[key]) for key in ('img', 'cls', 'bboxes'))
    source.close()


def test_images_that_augmentations_write_into__are_read_as_they_are(config):
    """Without mosaic and geometry the colours are changed in the image that was loaded."""
    still = dict(mosaic=0.0, mixup=0.0, cutmix=0.0, degrees=0.0, translate=0.0, scale=0.0, hsv_v=0.9)
    for kind in (False, 'ram'):
        source = YoloSource(changed(config, train=dict(still, cache=kind)), views=2, seed=0)
        first = source.bank.replay(3, 0)['img'].clone()
        source.bank.replay(3, 1)
        assert torch.equal(source.bank.replay(3, 0)['img'], first)
        source.close()


def test_views_of_instance_segmentation__are_replayed_with_their_masks(config, mask_data, student_yaml, teacher_file):
    """Copy-paste takes objects from other images."""
    for mode in ('flip', 'mixup'):
        cfg = changed(config, **{'train.copy_paste': 0.9, 'train.copy_paste_mode': mode})
        cfg.merge_from_dict(dict(student=student_yaml('yolo11', '-seg'), data=str(mask_data)))
        cfg.teacher.checkpoint = teacher_file('yolo11', '-seg')
        source = YoloSource(cfg, views=2, seed=0)
        first = [source.bank[i] for i in range(16)]
        for i in (9, 2, 15, 0):
            again = source.bank[i]
            assert all(torch.equal(again[key], first[i][key]) for key in ('img', 'masks', 'cls', 'bboxes'))
        source.close()


def test_albumentations__one_sentence(config):
    source = YoloSource(config, views=2, seed=0)
    for transform in _all_transforms(source.bank.dataset.transforms):
        if isinstance(transform, Albumentations):
            transform.transform = object()  # as it is where the package is installed
    with pytest.raises(ConfigError, match='data: Ultralytics augments with .* albumentations .*; uninstall it'):
        YoloViews(source.bank.dataset, 2)
    source.close()


# -- the same training -------------------------------------------------------------------------------------------------


def test_losses__are_those_of_the_live_teacher(config, cached, tmp_path, monkeypatch):
    again = losses(monkeypatch, cached, tmp_path / 'cached')
    with monkeypatch.context() as patch:
        original = DistillationTrainer.build_dataset

        def on_the_same_views(self, img_path, mode='train', batch=None):
            dataset = original(self, img_path, mode, batch)
            return YoloViews(dataset, 2, 0) if mode == 'train' else dataset

        patch.setattr(DistillationTrainer, 'build_dataset', on_the_same_views)
        live = losses(monkeypatch, config, tmp_path / 'live')
    assert live.shape == again.shape == (4, 5)  # box, class and distribution; two distillers
    assert np.allclose(again, live, rtol=2e-3)
    assert np.ptp(live[:, -1]) > 1e-3 and (live[:, -2:] > 0).all()  # they do differ from step to step
    for name in ('cached', 'live'):  # the plain student, as ever
        checkpoint = torch.load(tmp_path / name / 'weights' / 'last.pt', weights_only=False)
        assert checkpoint['model'] is not None and checkpoint.get('kd_dense') is None


def test_run_that_is_resumed__goes_on_with_the_views_it_would_have_seen(cached, tmp_path, monkeypatch):
    whole = losses(monkeypatch, cached, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        patch.setattr('kd_dense.yolo.run.requested', lambda: 15)  # SIGTERM, noticed at the end of the first epoch
        patch.setattr('kd_dense.yolo.run._stop_in_epoch', lambda trainer: None)
        with pytest.raises(Exception, match='holds 1 of 2 epochs'):
            train(cached, tmp_path / 'half')
    rest = losses(monkeypatch, cached, tmp_path / 'half', resume=True)
    assert np.allclose(rest, whole[2:], rtol=1e-4)


def test_teacher__is_built_for_the_comparison_and_let_go(cached, tmp_path):
    trainer = started(cached, tmp_path)
    gc.collect()
    widths = {m.model[0].conv.out_channels for m in gc.get_objects() if isinstance(m, DetectionModel)}
    assert trainer.distillation.student_model.model[0].conv.out_channels in widths and 12 not in widths
    assert trainer.distillation.teacher_model is None and trainer.ema.ema.teacher_model is None
    batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
    parts, items = trainer.distillation.train().loss(batch)
    parts.sum().backward()
    assert items['mimic'] > 0 and all(p.grad is not None for p in trainer.distillation.distillers.parameters())


def test_student_alone__trains_on_the_same_views(cached, cache, tmp_path):
    with_outputs = started(cached, tmp_path).train_loader.dataset
    alone = _on_views_of(StudentTrainer, cache)(overrides=_arguments(read(cached), tmp_path / 'alone'))
    alone._setup_train()
    assert isinstance(alone.train_loader.batch_sampler.sampler.sampler, ViewSampler)
    for item in (0, 7, 8, 15):
        a, b = with_outputs[item], alone.train_loader.dataset[item]
        assert torch.equal(a['img'], b['img']) and torch.equal(a['bboxes'], b['bboxes'])
        assert 'teacher_outputs' in a and 'teacher_outputs' not in b


def test_tool__writes_what_a_training_reads(write_config, tmp_path, capsys):
    path, folder = write_config(distillers=DISTILLERS, train=dict(TRAIN, epochs=1)), tmp_path / 'cache'
    tool = runpy.run_path(str(ROOT / 'tools' / 'cache_teacher.py'))
    tool['main']([str(path), '--cache', str(folder), '--views', '2', '--store', 'int8'])
    assert capsys.readouterr().out.splitlines()[-1].startswith('16 views, ')
    assert StoredCache.load(folder).manifest.store == 'int8'
    cfg = changed(Config.fromfile(str(path)), **{'teacher.cache': str(folder)})
    scores = {name: train(cfg, tmp_path / name, distill=name == 'distilled') for name in ('distilled', 'student')}
    assert {name: record.name for name, record in scores.items()} == {name: name for name in scores}
    assert scores['distilled'].extra_parameters > 0 and cache_of(cfg) == str(folder)


# -- few anchors -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def sure_teacher(tmp_path_factory) -> str:
    """Sees two of six classes in some places, and the others nowhere."""
    model = build('yolo26', 0.1875, seed=1, names=MORE_CLASSES)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 64, 64))
        for branches in (model.model[-1].cv3, model.model[-1].one2one_cv3):
            for branch in branches:
                branch[-1].weight *= torch.tensor([6.0, 6.0, 0.5, 0.5, 0.5, 0.5])[:, None, None, None]
                branch[-1].bias.fill_(-6)
    for norm in norms:
        norm.momentum = 0.03
    return str(save_model(model.eval(), tmp_path_factory.mktemp('sure') / 'teacher.pt'))


def test_few_anchors__train_as_all_of_them(config, sure_teacher, student_yaml, tmp_path, monkeypatch):
    """YOLO26 has two branches, and each of its distillers one of them."""
    cfg = changed(config, **{'teacher.checkpoint': sure_teacher, 'train.epochs': 1})
    cfg.student, cfg.data = student_yaml('yolo26'), str(write_data(tmp_path / 'data', names=MORE_CLASSES))
    cfg.distillers = dict(many=dict(type='LogitKD'), one=dict(type='LogitKD', taps='logits_one2one'))
    found = {}
    for name, options in (('all', OPTIONS), ('few', replace(OPTIONS, anchors=30, top_k=2))):
        folder = str(tmp_path / name)
        manifest = write_cache(cfg, folder, options)
        found[name] = losses(monkeypatch, changed(cfg, **{'teacher.cache': folder}), tmp_path / f'run_{name}')
    assert manifest.top_k == {'logits': [2, 6, 30], 'logits_one2one': [2, 6, 30]}
    record = StoredCache.load(tmp_path / 'few').read(0, 0).tensors
    # 84 places with the best class, 30 with two classes and what is left, the means of three levels, least and step
    assert size_of(record) == 2 * (2 * 84 + 30 * (2 + 2 * (2 + 1) + 2) + 3 * 6 * 4 + 8)
    assert np.allclose(found['few'][:, :-2], found['all'][:, :-2], rtol=1e-3)
    assert np.allclose(found['few'], found['all'], rtol=0.1) and not np.array_equal(found['few'], found['all'])
    cfg = changed(cfg, **{'teacher.cache': folder, 'distillers.many': dict(type='CWD', taps='logits')})
    with pytest.raises(ConfigError, match=r'teacher\.cache: distillers\.many \(CWD\) needs all of the class logits'):
        started(cfg, tmp_path / 'refused')


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'changes, sentence',
    [
        ({'train.hsv_h': 0.2}, r'data: its pipeline is not the one with which the cache was written'),
        ({'train.fraction': 0.9}, r'data: it has other images, or in another order'),
        ({'train.imgsz': 96}, r'data: its settings are not those'),
        ({'train.close_mosaic': 1}, r'train\.close_mosaic: ends mosaic, mixup, cutmix in the last 1 epochs, .*=0'),
        ({'train.multi_scale': 0.5}, r'train\.multi_scale: changes the size of whole batches'),
        ({'teacher.allow': ['model.0']}, r'teacher\.config: the teacher, or its scale, is not the one'),
        ({'distillers.mimic.taps': 'model.19'}, r"has nothing of the tap 'model\.19', only of logits"),
        ({'teacher.cache': 'nowhere'}, r'teacher\.cache: there is no cache in nowhere; write it with'),
    ],
)
def test_changed_config__one_sentence(cached, tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        started(changed(cached, **changes), tmp_path)


def test_wrong_teacher__one_sentence(cached, tmp_path, monkeypatch):
    other = save_model(build('yolo11', 0.1875, seed=2), tmp_path / 'other.pt')
    cfg = changed(cached, **{'teacher.checkpoint': str(other)})
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: the file has other contents .* write the cache again'):
        started(cfg, tmp_path)
    # should the hash ever miss it, the outputs do not
    monkeypatch.setattr('kd_dense.cache.fingerprint.file_hash', lambda checkpoint: None)
    with pytest.raises(ConfigError, match=r"at the tap '.*' cached and live outputs differ by .*%"):
        started(cfg, tmp_path)
    started(changed(cached, **{'teacher.checkpoint': 'nowhere.pt'}), tmp_path)  # without a file there is no telling


@pytest.mark.parametrize('package', ['kd_dense', 'ultralytics'])
def test_other_versions__one_sentence(cached, cache, tmp_path, monkeypatch, package):
    written = StoredCache.load(cache).manifest.fingerprint['versions']
    assert set(written) == {'kd_dense', 'torch', 'numpy', 'cv2', 'ultralytics'}
    monkeypatch.setattr(f'{package}.__version__', '0.0.1')
    with pytest.raises(ConfigError, match=rf'was written with {package} \S+ and 0\.0\.1 is installed'):
        started(cached, tmp_path)


def test_other_classes__one_sentence(cached, cache, tmp_path):
    folder = with_other_classes(cache, tmp_path / 'cache')
    with pytest.raises(ConfigError, match=r'teacher: has the same classes as the student but in another order'):
        started(changed(cached, **{'teacher.cache': str(folder)}), tmp_path)


def test_other_pixels__one_sentence(cached, data, tmp_path):
    root = Path(shutil.copytree(data.parent, tmp_path / 'data'))
    moved = root / 'data.yaml'
    moved.write_text(moved.read_text().replace(str(data.parent), str(root)))
    cfg = changed(cached, data=str(moved))
    started(cfg, tmp_path)  # moved
    for path in (root / 'images' / 'train').glob('*.png'):
        cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    with pytest.raises(ConfigError, match=r'data: view \d of image \d does not come out as when .* was written'):
        started(cfg, tmp_path)


def test_damaged_shard__stops_the_training_and_is_written_anew(config, cached, cache, tmp_path):
    folder = Path(shutil.copytree(cache, tmp_path / 'cache'))
    path = shard_path(folder, 1)
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r'shard-00001.* was damaged, record \d+ has another checksum; run tools/'):
        train(changed(cached, **{'teacher.cache': str(folder), 'teacher.checkpoint': 'nowhere.pt'}), tmp_path / 'run')
    write_cache(config, str(folder), OPTIONS)
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
    check_goes_on(config, cache, tmp_path, OPTIONS)


def test_config_that_can_not_be_cached__one_sentence(config, tmp_path):
    for changes, sentence in (
        ({'train.close_mosaic': 10}, r'train\.close_mosaic: ends'),
        ({'train.multi_scale': 0.5}, r'train\.multi_scale'),
    ):
        with pytest.raises(ConfigError, match=sentence):
            write_cache(changed(config, **changes), str(tmp_path / 'cache'), OPTIONS)
    with pytest.raises(ConfigError, match=r'--top-k: the classes of this sigmoid head .*; add --anchors'):
        write_cache(config, str(tmp_path / 'cache'), replace(OPTIONS, top_k=1))
    assert not (tmp_path / 'cache' / 'cache.json').exists()
