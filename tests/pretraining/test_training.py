"""Training from soft labels: it learns, it resumes, and what it writes begins a segmentor."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from kd_dense import BackbonePretraining, ConfigError, PretrainingHook, checkpoint
from kd_dense.cache import use_cache
from kd_dense.engine.run import train
from kd_dense.losses.sparse import sparse_cross_entropy
from kd_dense.models.build import build_model
from kd_dense.models.pretraining import _backbone_of
from kd_dense.pretraining.verify import verify
from tests.helpers import tiny
from tests.pretraining import teachers
from tests.pretraining.conftest import cache_folder, changed
from tests.tools.conftest import forget_runs


def run(cfg, work_dir, **arguments):
    """Log lines of a training."""
    forget_runs()
    train(cfg, str(work_dir), **arguments)
    lines = [json.loads(s) for f in work_dir.glob('*/vis_data/scalars.json') for s in f.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


def loader_of(cfg):
    init_default_scope('mmengine')
    return Runner.build_dataloader(use_cache(cfg).train_dataloader, seed=0)


def built(cfg, **student):
    cfg = changed(cfg)
    return BackbonePretraining(**{k: v for k, v in {**cfg.model, **student}.items() if k != 'type'})


@pytest.fixture(scope='module')
def trained(cached, tmp_path_factory):
    """The work dir of six iterations, and what was logged."""
    folder = tmp_path_factory.mktemp('pretrained') / 'run'
    return folder, run(cached, folder)


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_log__has_loss_kl_and_agreement(trained):
    _, lines = trained
    assert len(lines) == 6
    for line in lines:
        assert 0 < line['kl'] < line['loss'] and 0 <= line['agreement'] <= 1


def test_loss__falls(cached, tmp_path):
    cfg = changed(cached, **{'train_cfg.max_iters': 20, 'optim_wrapper.optimizer.lr': 0.01})
    cfg.train_dataloader.batch_size = 8
    divergence = [line['kl'] for line in run(cfg, tmp_path)]
    assert np.mean(divergence[-5:]) < 0.75 * np.mean(divergence[:5])


def test_loss__is_that_of_the_records_of_the_batch(cached):
    loader = loader_of(cached)
    batch = next(iter(loader))
    model = built(cached).eval()
    data = model.data_preprocessor(batch, True)
    with torch.no_grad():
        found = model(**data, mode='loss')['loss']
        logits = model(data['inputs'])
    cache, images = loader.dataset.cache, {record_image(loader.dataset, item): item for item in range(16)}
    records = []
    for image in batch['inputs']:
        view, index = divmod(images[image.numpy().tobytes()], 8)
        records.append(cache.read(index, view).tensors)
    expected = sparse_cross_entropy(logits, *(torch.stack([r[n] for r in records]) for n in ('t0_0_p', 't0_0_c')))
    assert torch.allclose(found, expected, atol=1e-6)


def record_image(dataset, item):
    return dataset[item]['inputs'].numpy().tobytes()


def test_collate_functions__give_the_same(cached):
    cfg = changed(cached)
    del cfg.train_dataloader['collate_fn']  # MMEngine's own: lists
    model, losses = built(cached).eval(), []
    for config in (cached, cfg):
        data = model.data_preprocessor(next(iter(loader_of(config))), True)
        with torch.no_grad():
            losses.append(model(**data, mode='loss')['loss'])
    assert torch.allclose(*losses, atol=1e-6)


def test_teacher__is_in_no_memory_of_the_model(cached):
    model = built(cached)
    assert {name.split('.')[0] for name in model.state_dict()} == {'backbone', 'head'}
    assert model.head.out_features == 150 and all(p.requires_grad for p in model.parameters())
    model.train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 15 and all(norm.training for norm in norms)  # the config would keep them in eval


def test_images__are_normalised_as_the_student_wants_them(cached):
    model = built(changed(cached, **{'model.student.data_preprocessor.mean': [10, 20, 30]}))
    assert model.data_preprocessor.mean.flatten().tolist() == [10, 20, 30]
    assert built(cached, data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1])).data_preprocessor.mean[0] == 1
    alone = built(cached, student=dict(type='kd_dense.TinyViT', arch='5m', out_indices=(3,), pool_before_norm=True))
    assert alone.data_preprocessor.mean.flatten().tolist() == pytest.approx(tiny.MEAN)


def test_student_of_a_stock_config__is_trained_as_a_whole():
    backbone, normalization = _backbone_of('mmdet::gfl/gfl_r50_fpn_1x_coco.py')
    assert (backbone.type, backbone._scope_, backbone.depth) == ('ResNet', 'mmdet', 50)
    assert (backbone.frozen_stages, backbone.norm_eval, backbone.init_cfg) == (-1, False, None)
    assert normalization == dict(mean=tiny.MEAN, std=tiny.STD, bgr_to_rgb=True)


def test_tinyvit__has_as_many_parameters_as_the_classifier(cached):
    model = built(cached, student=dict(type='kd_dense.TinyViT', arch='5m', out_indices=(3,), pool_before_norm=True))
    assert sum(p.numel() for p in model.parameters()) == 5_071_764 + 150 * 321
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 150)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_checkpoint__begins_a_stock_segmentor(trained):
    folder, _ = trained
    path = str(folder / 'iter_6.pth')
    state = checkpoint.load(path)['state_dict']
    plain = {name.removeprefix('backbone.'): value for name, value in state.items() if name.startswith('backbone.')}
    config = tiny.segmentor(4)
    stock = build_model(config, 'student')
    stock.backbone.load_state_dict(plain, strict=True)
    config['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint=path, prefix='backbone.')
    forget_runs()
    again = build_model(config, 'student')
    again.init_weights()
    found = again.backbone.state_dict()
    assert set(found) == set(plain) and all(torch.equal(found[name], value) for name, value in plain.items())


def test_resume__ends_as_the_whole_run(cached, trained, tmp_path):
    folder, _ = trained
    forget_runs()
    train(cached, str(tmp_path), resume=str(folder / 'iter_3.pth'))
    whole, rest = (checkpoint.load(path / 'iter_6.pth')['state_dict'] for path in (folder, tmp_path))
    assert list(whole) == list(rest) and all(torch.equal(a, rest[name]) for name, a in whole.items())


# -- what does not belong together -------------------------------------------------------------------------------------


def test_verification__compares_with_the_live_teacher(cached, tmp_path):
    assert verify(cached, loader_of(cached)) < 1e-3
    gone = changed(cached, **{'model.teacher.checkpoint': 'nowhere.pth'})
    assert verify(gone, loader_of(gone)) is None


def test_other_teacher_file__one_sentence(cached, tmp_path, monkeypatch):
    cfg = changed(cached, **{'model.teacher.checkpoint': teachers.saved(tmp_path / 'other.pth', seed=1)})
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: the file has other contents .* write the cache again'):
        verify(cfg, loader_of(cfg))
    monkeypatch.setattr('kd_dense.cache.fingerprint.file_hash', lambda path: None)  # should the hash ever miss it
    with pytest.raises(ConfigError, match=r'cached and live probabilities differ by .*% of the whole for view'):
        verify(cfg, loader_of(cfg))


@pytest.mark.parametrize(
    'changes, sentence',
    [
        ({'model.teacher.mean': [1, 2, 3]}, r'teacher\.config: the teacher, or its scale, is not the one'),
        ({'train_dataloader.dataset.pipeline.1.transforms.1.p': 0.2}, r'its pipeline is not the one'),
        ({'train_dataloader.dataset.indices': 8}, r'its settings are not those'),
        ({'model.student.backbone.base_channels': 8}, None),  # another student may use it
        ({'train_dataloader.batch_size': 2}, None),
    ],
)
def test_changed_config__one_sentence(cached, changes, sentence):
    cfg = changed(cached, **changes)
    if sentence is None:
        verify(cfg, loader_of(cfg))
    else:
        with pytest.raises(ConfigError, match=sentence):
            verify(cfg, loader_of(cfg))


def test_run_without_the_views__one_sentence(cached):
    init_default_scope('mmengine')
    loader = Runner.build_dataloader(cached.train_dataloader, seed=0)
    with pytest.raises(ConfigError, match=r'does not go through the views of teacher\.cache; train with tools/train'):
        verify(cached, loader)
    model = built(cached)
    with pytest.raises(ConfigError, match=r'its samples bring nothing of teacher\.cache along'):
        model(**model.data_preprocessor(next(iter(loader)), True), mode='loss')


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(students=1), r"BackbonePretraining has no option 'students'; did you mean 'student'"),
        (dict(teacher=dict(config='a:b', checkpoint='c')), r'teacher\.cache: BackbonePretraining is trained from one'),
        (dict(teacher=dict(config='a:b', checkpoint='c', cache='x')), r'teacher\.cache: there is no cache in x'),
        (dict(student='configs/_base_/camvid.py'), r'student: configs/_base_/camvid\.py has no model section'),
    ],
)
def test_what_can_not_work__is_one_sentence(cached, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        built(cached, **options)


def test_frozen_backbone__one_sentence(cached):
    student = build_model(
        tiny.segmentor(4) | {'backbone': {**tiny.segmentor(4)['backbone'], 'frozen_stages': 2}}, 'student'
    )
    with pytest.raises(ConfigError, match=r'keeps \d+ tensors from being trained \(.*\), and they would stay random'):
        built(cached, student=student)


def test_hook_with_another_model__one_sentence():
    runner = SimpleNamespace(model=torch.nn.Identity())
    with pytest.raises(ConfigError, match=r"PretrainingHook needs a model of type 'kd_dense\.BackbonePretraining'"):
        PretrainingHook().before_train(runner)


def test_student_alone__one_sentence(cached, tmp_path):
    with pytest.raises(ConfigError, match='--student-alone: pre-training has no labels but those of its teacher'):
        train(cached, str(tmp_path), distill=False)
    assert cache_folder(cached).is_dir()
