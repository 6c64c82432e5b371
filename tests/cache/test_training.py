"""Training from a cache: the same losses as with the live teacher, no teacher, and every mismatch in one sentence."""

import copy
import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from kd_dense import ConfigError, Distillation
from kd_dense.cache import CachedTeacherDataset, ViewBank, fingerprint, use_cache
from kd_dense.cache.store import StoredCache
from kd_dense.cache.verify import verify
from kd_dense.cache.write import write_cache
from kd_dense.engine.run import train
from kd_dense.errors import sentence as one_line
from tests.cache.conftest import OPTIONS, changed, with_cache, with_other_classes
from tests.helpers import tiny
from tests.tools.conftest import forget_runs


def on_the_same_views(config, views=2):
    """Live, from the views of a cache."""
    cfg = copy.deepcopy(config)
    loader = cfg.train_dataloader
    loader.dataset = dict(type='kd_dense.ViewBank', dataset=loader.dataset, views=views, seed=0)
    loader.sampler = dict(type='kd_dense.ViewSampler', sampler=loader.sampler)
    return cfg


def losses(cfg, work_dir, **arguments):
    """Loss name -> values of all iterations of a training."""
    forget_runs()
    train(cfg, str(work_dir), **arguments)
    lines = [json.loads(s) for f in work_dir.glob('*/vis_data/scalars.json') for s in f.read_text().splitlines()]
    lines = [line for line in lines if 'loss' in line]
    return {key: np.array([line[key] for line in lines]) for key in lines[0] if 'loss' in key}


def start(cfg):
    """What a run does before its first iteration."""
    cfg = use_cache(cfg)
    init_default_scope('mmseg')
    model = Distillation(**{key: cfg.model[key] for key in ('student', 'teacher', 'distillers')})
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return verify(cfg, model, loader), model, loader


# -- the same training -------------------------------------------------------------------------------------------------


def test_losses__are_those_of_the_live_teacher(config, cached, tmp_path):
    live = losses(on_the_same_views(config), tmp_path / 'live')
    again = losses(cached, tmp_path / 'cached')
    assert {'decode.loss_ce', 'kd.logits.loss', 'kd.mimic.loss'} < set(live) and set(live) == set(again)
    assert all(len(values) == 6 for values in live.values())  # more than the four of one pass
    for name, values in live.items():
        assert np.allclose(again[name], values, rtol=2e-3), name
    assert np.ptp(live['kd.mimic.loss']) > 0.01  # they do differ from step to step


def test_student_alone__trains_on_the_same_views(cached):
    configs = (use_cache(cached, outputs=outputs).train_dataloader.dataset for outputs in (True, False))
    with_outputs, without = (CachedTeacherDataset(c.dataset, c.cache, c.outputs) for c in configs)
    for item in (0, 7, 8, 15):
        a, b = with_outputs[item], without[item]
        assert torch.equal(a['inputs'], b['inputs'])
        assert torch.equal(a['data_samples'].gt_sem_seg.data, b['data_samples'].gt_sem_seg.data)
        assert 'teacher_outputs' in a['data_samples'] and 'teacher_outputs' not in b['data_samples']


def test_teacher__is_built_for_the_comparison_and_let_go(cached):
    live, model, loader = start(cached)
    reference = weakref.ref(live.teacher.model)
    del live
    gc.collect()
    assert reference() is None and model.teacher.model is None
    model.progress = 0.0
    data = model.data_preprocessor(next(iter(loader)), True)
    found = model(**data, mode='loss')
    assert all(found[f'kd.{name}.loss'] > 0 for name in ('logits', 'mimic'))
    found['kd.mimic.loss'].backward()
    assert all(p.grad is not None for p in model.distillers.parameters())


def test_teacher_file_that_is_gone__is_not_needed(cached, tmp_path):
    cfg = changed(cached, **{'model.teacher.checkpoint': 'nowhere.pth', 'custom_hooks.0.score_teacher': True})
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    assert losses(cfg, tmp_path)['kd.mimic.loss'] > 0
    assert not (tmp_path / 'teacher_score.json').exists()


def test_teacher_file_that_is_there__is_scored(cached, tmp_path):
    cfg = changed(cached, **{'custom_hooks.0.score_teacher': True})
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    losses(cfg, tmp_path)
    assert 'mIoU' in json.loads((tmp_path / 'teacher_score.json').read_text())['score']


@pytest.mark.slow
def test_workers_and_resume__change_nothing(cached, tmp_path):
    cfg = changed(cached, **{'train_dataloader.num_workers': 2, 'default_hooks.checkpoint.interval': 3})
    whole = losses(cached, tmp_path / 'whole')
    losses(cfg, tmp_path / 'half')
    forget_runs()
    train(cfg, str(tmp_path / 'rest'), resume=str(tmp_path / 'half' / 'iter_3.pth'))
    states = [torch.load(tmp_path / p / 'iter_6.pth', weights_only=False)['state_dict'] for p in ('whole', 'rest')]
    assert whole and all(torch.allclose(a, states[1][name]) for name, a in states[0].items())


def test_fewer_distillers__read_the_same_cache(cached):
    cfg = copy.deepcopy(cached)
    del cfg.model.distillers.logits
    _, model, loader = start(cfg)
    data = model.data_preprocessor(next(iter(loader)), True)
    assert list(model.teacher(data['data_samples'], model.distillers.tap_names('teacher'))) == ['backbone:3']


def test_int8__is_smaller_and_trains_alike(config, cached, tmp_path):
    manifest = write_cache(config, str(tmp_path / 'cache'), replace(OPTIONS, store='int8'))
    fp16 = StoredCache.load(cached.model.teacher.cache).manifest
    assert manifest.store == 'int8' and sum(manifest.shard_bytes) < sum(fp16.shard_bytes)
    _, model, loader = start(with_cache(config, tmp_path / 'cache'))
    _, other, _ = start(cached)
    data = model.data_preprocessor(next(iter(loader)), True)
    names = model.distillers.tap_names('teacher')
    samples = [loader.dataset.cache.read(0, 0).tensors]
    exact = [other.teacher.cache.read(0, 0).tensors]
    found, expected = model.teacher.outputs(samples, names), other.teacher.outputs(exact, names)
    for name in names:
        off = (found[name][0] - expected[name][0]).norm() / expected[name][0].norm()
        assert 1e-4 < off < 0.01, name
    model.progress = 0.0
    assert all(value.isfinite().all() for key, value in model(**data, mode='loss').items() if 'kd' in key)
    with pytest.raises(ConfigError, match=r'other settings \(store: int8, not fp16\)'):
        write_cache(config, str(tmp_path / 'cache'), OPTIONS)


def test_int8__where_it_changes_too_much__one_sentence(config, tmp_path, monkeypatch):
    monkeypatch.setattr('kd_dense.cache.write.TOLERANCE', 1e-4)
    with pytest.raises(ConfigError, match=r"--store int8: changes the outputs of the teacher at '.*' by .*%.* in fp16"):
        write_cache(config, str(tmp_path / 'cache'), replace(OPTIONS, store='int8'))
    assert not (tmp_path / 'cache' / 'cache.json').exists()


def test_top_k__is_close_and_smaller(config, cached, tmp_path):
    cfg = copy.deepcopy(config)
    del cfg.model.distillers.mimic
    cfg.model.distillers.logits.temperature = 1.0
    manifest = write_cache(cfg, str(tmp_path / 'cache'), replace(OPTIONS, top_k=3))
    assert manifest.top_k == {'logits': [3, 7]}
    live, model, loader = start(with_cache(cfg, tmp_path / 'cache'))
    data = model.data_preprocessor(next(iter(loader)), True)
    (logits,) = model.teacher(data['data_samples'], ['logits'])['logits']
    taps = live.distillers.taps('teacher', live.distillers.methods)
    run = lambda images: live._run_teacher(images, data['data_samples'], taps)  # noqa: E731
    (expected,) = live.teacher(taps, data['inputs'], run)['logits']
    a, b = logits.softmax(1), expected.softmax(1)
    top = b.topk(3, 1).indices
    assert logits.shape == expected.shape and torch.allclose(a.gather(1, top), b.gather(1, top), atol=1e-3)
    assert torch.allclose(a.sum(1), torch.ones(2, 12, 12), atol=1e-5)


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def detection(scenes, tmp_path_factory):
    """Crops of many sizes, batches by aspect ratio."""

    def build(divisor, epochs):
        student, teacher = tiny.detector('GFL'), tiny.detector('GFL', width=8)
        student['data_preprocessor']['pad_size_divisor'] = teacher['data_preprocessor']['pad_size_divisor'] = divisor
        model = dict(
            type='kd_dense.Distillation',
            student=student,
            teacher=dict(config=teacher, checkpoint=tiny.saved(teacher, folder / 'teacher.pth')),
            distillers=dict(neck=dict(type='FeatureMimic', taps='neck'), logits=dict(type='LogitKD')),
        )
        cfg = tiny.detection_run(model, scenes, epochs)
        crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(30, 64), allow_negative_crop=True)
        cfg.train_dataloader.dataset.pipeline.insert(2, crop)
        cfg.train_dataloader.dataset.serialize_data = False
        cfg.train_dataloader.batch_sampler = dict(type='AspectRatioBatchSampler')
        cfg.custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=False)]
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        return cfg

    folder = tmp_path_factory.mktemp('cache_detection')
    return build


def test_detection__one_canvas__the_losses_are_those_of_the_live_teacher(detection, tmp_path):
    cfg = detection(64, epochs=2)
    write_cache(cfg, str(tmp_path / 'cache'), OPTIONS)
    live = losses(on_the_same_views(cfg), tmp_path / 'live')
    again = losses(with_cache(cfg, tmp_path / 'cache'), tmp_path / 'cached')
    assert {'loss_cls', 'kd.neck.loss', 'kd.logits.loss'} < set(live) and len(live['loss_cls']) == 8
    for name, values in live.items():
        assert np.allclose(again[name], values, rtol=5e-3), (name, again[name], values)


def test_detection__several_canvases__differ_at_the_borders_only(detection, tmp_path):
    cfg = detection(16, epochs=1)
    write_cache(cfg, str(tmp_path / 'cache'), OPTIONS)
    live = losses(on_the_same_views(cfg), tmp_path / 'live')
    again = losses(with_cache(cfg, tmp_path / 'cache'), tmp_path / 'cached')
    print({name: (again[name] / live[name] - 1).round(3) for name in live})
    for name in ('loss_cls', 'loss_bbox', 'loss_dfl'):
        assert np.allclose(again[name][:1], live[name][:1], rtol=1e-5)  # the same views
    for name in ('kd.neck.loss', 'kd.logits.loss'):
        assert np.allclose(again[name], live[name], rtol=0.02)


def test_detection__its_toolbox_and_its_objects_are_part_of_the_fingerprint(detection, scenes, tmp_path):
    """Crops look at the boxes: where there are others, views are others."""
    cfg = detection(64, epochs=1)
    assert {'kd_dense', 'mmengine', 'mmcv', 'mmdet'} <= set(fingerprint.fingerprint(cfg)['versions'])
    init_default_scope('mmdet')
    root = Path(shutil.copytree(scenes, tmp_path / 'scenes'))
    moved = changed(cfg, **{'train_dataloader.dataset.data_root': f'{root}/'}).train_dataloader.dataset
    before = ViewBank(cfg.train_dataloader.dataset, 1).images()
    assert ViewBank(moved, 1).images() == before
    path = root / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'].pop()
    path.write_text(json.dumps(content))
    assert ViewBank(moved, 1).images() != before


# -- what is no longer as it was ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'changes, sentence',
    [
        ({'train_dataloader.dataset.pipeline.4.type': 'RandomFlip'}, None),  # as it is
        ({'train_dataloader.dataset.pipeline.4.prob': 0.2}, r'train_dataloader\.dataset: its pipeline is not the one'),
        ({'train_dataloader.dataset.test_mode': False}, r'train_dataloader\.dataset: its settings are not those'),
        ({'model.teacher.scale': 2.0}, r'teacher\.config: the teacher, or its scale, is not the one'),
        ({'model.student.data_preprocessor.mean': [1, 2, 3]}, r'student\.data_preprocessor: .* are not prepared as'),
        ({'model.student.backbone.stem_channels': 8}, None),  # another student may use it
        ({'model.distillers.mimic.taps': 'backbone:2'}, r"has nothing of the tap 'backbone:2', only of logits"),
        ({'custom_hooks.0.type': 'PipelineSwitchHook'}, r'custom_hooks: PipelineSwitchHook changes the pipeline'),
    ],
)  # fmt: skip
def test_changed_config__one_sentence(cached, changes, sentence):
    cfg = changed(cached, **changes)
    if sentence is None:
        start(cfg)
    else:
        with pytest.raises(ConfigError, match=sentence):
            start(cfg)


def test_wrong_teacher__one_sentence(cached, tmp_path, monkeypatch):
    other = tiny.saved(tiny.segmentor(8), tmp_path / 'other.pth', seed=2)
    cfg = changed(cached, **{'model.teacher.checkpoint': other})
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: the file has other contents .* write the cache again'):
        start(cfg)
    # should the hash ever miss it, the outputs do not
    monkeypatch.setattr(fingerprint, 'file_hash', lambda checkpoint: None)
    with pytest.raises(ConfigError, match=r"at the tap '.*' cached and live outputs differ by .*%"):
        start(cfg)


@pytest.mark.parametrize('package', ['kd_dense', 'cv2', 'mmengine', 'mmcv', 'mmseg'])
def test_other_versions__one_sentence(cached, cache, monkeypatch, package):
    written = StoredCache.load(cache).manifest.fingerprint['versions']
    assert set(written) == {'kd_dense', 'torch', 'numpy', 'cv2', 'mmengine', 'mmcv', 'mmseg'}
    monkeypatch.setattr(f'{package}.__version__', '0.0.1')
    with pytest.raises(ConfigError, match=rf'was written with {package} \S+ and 0\.0\.1 is installed'):
        start(cached)


def test_other_classes__one_sentence(config, cache, tmp_path):
    folder = with_other_classes(cache, tmp_path / 'cache')
    with pytest.raises(ConfigError, match=r'teacher: has the same classes as the student but in another order'):
        losses(with_cache(config, folder), tmp_path / 'run')


@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_shard__stops_the_training_with_one_sentence(config, cache, tmp_path, workers):
    folder = Path(shutil.copytree(cache, tmp_path / 'cache'))
    paths = sorted(folder.glob('*.safetensors'))
    for path in paths:  # the last record of each: what is looked at before the training is among the others
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    cfg = changed(with_cache(config, folder), **{'train_dataloader.num_workers': workers})
    with pytest.raises(ConfigError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr('kd_dense.cache.verify.replayed_alike', lambda bank, count: {(0, 0): bank.replay(0, 0)})
        losses(cfg, tmp_path / 'run')
    assert re.fullmatch(
        r'teacher\.cache: \S+/shard-0000\d\.safetensors was damaged, record \d+ has another checksum; run '
        r'tools/cache_teacher\.py CONFIG again, which writes only what is missing or broken',
        one_line(error.value),
    )
    assert not list((tmp_path / 'run').glob('*.pth'))
    write_cache(config, str(folder), OPTIONS)
    StoredCache.load(folder)
    assert all(path.read_bytes() == (Path(cache) / path.name).read_bytes() for path in paths)


def test_teacher_in_reduced_precision__may_write_what_is_compared_in_fp32(config, tmp_path):
    write_cache(changed(config, **{'model.teacher.precision': 'bf16'}), str(tmp_path / 'cache'), OPTIONS)
    cfg = with_cache(config, tmp_path / 'cache')
    live, model, loader = start(cfg)
    data = model.data_preprocessor(next(iter(loader)), True)
    (cached,) = model.teacher(data['data_samples'], ['logits'])['logits']
    taps = live.distillers.taps('teacher', live.distillers.methods)
    run = lambda images: live._run_teacher(images, data['data_samples'], taps)  # noqa: E731
    (exact,) = live.teacher(taps, data['inputs'], run)['logits']
    off = (cached.softmax(1) - exact.softmax(1)).abs().max()
    assert 1e-5 < off < 1e-2


def test_other_images__one_sentence(cached, scenes, tmp_path):
    root = Path(shutil.copytree(scenes, tmp_path / 'scenes'))
    cfg = changed(cached, **{'train_dataloader.dataset.data_root': str(root)})
    start(cfg)  # moved
    images = sorted(root.glob('leftImg8bit/train/**/*.png'))
    kept = cv2.imread(str(images[0]))
    for path in images:
        cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    with pytest.raises(ConfigError, match=r'view \d of image \d does not come out as when .* was written'):
        start(cfg)
    cv2.imwrite(str(images[0].with_name(images[0].name.replace('_leftImg8bit', 'x_leftImg8bit'))), kept)
    with pytest.raises(ConfigError, match=r'train_dataloader\.dataset: it has other images, or in another order'):
        start(cfg)


def test_run_that_does_not_use_the_views__one_sentence(cached, tmp_path):
    model = Distillation(**{key: cached.model[key] for key in ('student', 'teacher', 'distillers')})
    model.progress = 0.0
    with pytest.raises(ConfigError, match=r'train_dataloader: its samples bring nothing of teacher\.cache along'):
        model(**model.data_preprocessor(tiny.segmentation_batch(size=(48, 48)), True), mode='loss')
    init_default_scope('mmseg')
    with pytest.raises(
        ConfigError, match=r'train_dataloader\.dataset: does not bring the outputs of teacher\.cache along'
    ):
        verify(cached, model, Runner.build_dataloader(cached.train_dataloader, seed=0))
    cfg = use_cache(cached)
    cfg.train_dataloader.sampler = cached.train_dataloader.sampler
    with pytest.raises(ConfigError, match=r"train_dataloader\.sampler: must be dict\(type='kd_dense\.ViewSampler'"):
        verify(cfg, model, Runner.build_dataloader(cfg.train_dataloader, seed=0))


def test_roi_distillers__one_sentence(cached):
    cfg = changed(cached, **{'model.distillers.mimic.type': 'RoIKD'})
    del cfg.model.distillers.mimic['taps']
    with pytest.raises(ConfigError, match=r'distillers\.mimic: '):
        start(cfg)


def test_use_cache__twice_is_once(cached):
    assert use_cache(use_cache(cached)).train_dataloader == use_cache(cached).train_dataloader
    assert cached.train_dataloader.dataset.type == 'kd_dense.SceneDataset'
