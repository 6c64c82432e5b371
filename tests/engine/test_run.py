"""Real training runs of MMSegmentation and MMDetection through the functions behind the tools."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kd_dense import ConfigError, DistillationError
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.run import _metric, check_data, evaluate, examples, student_alone, train
from kd_dense.models.build import build_model
from kd_dense.registry import LOSSES
from tests.helpers import tiny


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    config = tiny.segmentor(8)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    return dict(config=config, checkpoint=tiny.saved(config, path, CLASSES))


def distillation(teacher, **distillers):
    distillers = distillers or dict(
        logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.1)),
        nfd=dict(type='NFD', taps='backbone:2', loss_weight=dict(value=2.0, warmup=0.5)),
    )
    return dict(type='kd_dense.Distillation', student=tiny.segmentor(4), teacher=teacher, distillers=distillers)


def weights(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def run(teacher, data, tmp_path_factory):
    """One distilled run of four iterations, and its config."""
    cfg = tiny.segmentation_run(distillation(teacher), data)
    work_dir = tmp_path_factory.mktemp('run')
    record = train(cfg, str(work_dir), seed=3)
    return cfg, work_dir, record


def test_train__writes_a_plain_student_and_the_rest_beside_it(run):
    cfg, work_dir, record = run
    checkpoint = weights(work_dir / 'iter_4.pth')
    plain = build_model(tiny.segmentor(4), 'student')
    plain.load_state_dict(checkpoint['state_dict'], strict=True)
    state = checkpoint['kd_dense']['distillers']
    assert any('connectors' in k for k in state) and state['weights.logits.value'] > 0
    parameters = sum(p.numel() for p in plain.parameters())
    extra = sum(v.numel() for k, v in state.items() if 'connectors' in k)
    # the optimizer has the student and the connectors, and nothing of the teacher
    assert len(checkpoint['optimizer']['param_groups'][0]['params']) == len(list(plain.parameters())) + 1
    assert (record.name, record.seed, record.iterations, record.metric) == ('distilled', 3, 4, 'mIoU')
    assert (record.parameters, record.extra_parameters) == (parameters, extra)
    assert [i for i, _ in record.curve] == [2, 4] and record.value == record.curve[-1][1]
    assert Path(record.checkpoint).samefile(work_dir / 'iter_4.pth')


def test_train__stock_toolbox_loads_and_scores_the_checkpoint(run, tmp_path):
    cfg, work_dir, record = run
    stock = student_alone(cfg)
    assert 'kd_dense.Distillation' not in str(stock.model)
    assert not [h for h in stock.custom_hooks if 'Distillation' in str(h)]
    stock.work_dir, stock.load_from = str(tmp_path), str(work_dir / 'iter_4.pth')
    metrics = Runner.from_cfg(stock).test()
    assert metrics['mIoU'] == pytest.approx(record.value, abs=1e-6)
    ours = evaluate(cfg, str(work_dir / 'iter_4.pth'), str(tmp_path / 'ours'), official_cityscapes=True)
    assert ours['mIoU'] == pytest.approx(record.value, abs=1e-6)
    assert ours['cityscapesscripts/IoU_classes'] == pytest.approx(record.value, abs=0.02)


def test_resume__ends_like_an_uninterrupted_run(run, tmp_path):
    cfg, work_dir, record = run
    shutil.copy(work_dir / 'iter_2.pth', tmp_path)
    shutil.copy(work_dir / 'curve.json', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    resumed = train(cfg, str(tmp_path), seed=3, resume='auto')
    a, b = weights(work_dir / 'iter_4.pth'), weights(tmp_path / 'iter_4.pth')
    for part in (lambda c: c['state_dict'], lambda c: c['kd_dense']['distillers']):
        assert all(torch.equal(v, part(b)[k]) for k, v in part(a).items())
    assert resumed.curve == record.curve


def test_resume__of_a_student_alone_checkpoint_is_refused(run, tmp_path, data):
    cfg, _, _ = run
    train(cfg, str(tmp_path), distill=False)
    with pytest.raises(ConfigError, match='no distillation state'):
        train(cfg, str(tmp_path), resume='auto')


def test_teacher_score__is_measured_once(run, tmp_path, monkeypatch):
    cfg, work_dir, _ = run
    score = json.loads((work_dir / 'teacher_score.json').read_text())
    stock = student_alone(cfg)
    stock.model, stock.work_dir = cfg.model.teacher.config, str(tmp_path)
    stock.load_from = cfg.model.teacher.checkpoint
    assert Runner.from_cfg(stock).test()['mIoU'] == pytest.approx(score['score']['mIoU'], abs=1e-6)
    shutil.copy(work_dir / 'teacher_score.json', tmp_path)
    monkeypatch.setattr('kd_dense.engine.hook.evaluate', lambda *_: pytest.fail('scored again'))
    train(cfg, str(tmp_path))


def test_student_alone__draws_the_same_random_numbers(run, tmp_path, teacher, data):
    """A distillation that has not begun trains exactly like the student alone."""
    cfg = tiny.segmentation_run(
        distillation(teacher, cwd=dict(type='CWD', loss_weight=dict(value=1.0, start=0.99))), data
    )
    train(cfg, str(tmp_path / 'a'), seed=1)
    train(cfg, str(tmp_path / 'b'), seed=1, distill=False)
    a, b = weights(tmp_path / 'a/iter_4.pth')['state_dict'], weights(tmp_path / 'b/iter_4.pth')['state_dict']
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_ema_and_accumulation__leave_a_plain_student(teacher, data, tmp_path):
    cfg = tiny.segmentation_run(distillation(teacher), data)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5), dict(type='kd_dense.DistillationHook')]
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01), accumulative_counts=2)
    train(cfg, str(tmp_path))
    checkpoint = weights(tmp_path / 'iter_4.pth')
    plain = build_model(tiny.segmentor(4), 'student')
    plain.load_state_dict(checkpoint['state_dict'], strict=True)
    # teacher (8 channels) nowhere, connectors only where they belong
    assert set(checkpoint['ema_state_dict']) == {'steps'} | {f'module.{k}' for k in plain.state_dict()}
    assert not torch.equal(
        checkpoint['state_dict']['decode_head.conv_seg.weight'],
        checkpoint['ema_state_dict']['module.decode_head.conv_seg.weight'],
    )


def test_connector_without_gradient__stops_the_run(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setitem(
        LOSSES.module_dict, 'dead', lambda s, t, mask=None: (s.detach() - t).square().mean() + 0 * s.sum()
    )
    method = dict(type='FeatureMimic', taps='backbone:3', loss='dead')
    with pytest.raises(DistillationError, match=r'distillers\.m: no gradient reached connectors\.0'):
        train(tiny.segmentation_run(distillation(teacher, m=method), data), str(tmp_path))


def test_class_lists__are_compared_by_name(data, tmp_path):
    config = tiny.segmentor(8)
    other = ('road', *CLASSES[1:])
    teacher = dict(config=config, checkpoint=tiny.saved(config, tmp_path / 't.pth', other))
    cfg = tiny.segmentation_run(distillation(teacher), data)
    with pytest.raises(ConfigError, match=r'classes differ.*lacks background.*adds road'):
        train(cfg, str(tmp_path / 'a'))
    cfg.model.teacher.classes = {'background': 'road'}
    assert train(cfg, str(tmp_path / 'b')).finished


def test_missing_data__is_named_before_anything_is_built(run, tmp_path):
    cfg, _, _ = run
    cfg = Config(cfg.to_dict())
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match=r'train_dataloader\.dataset\.data_root: there is no folder .*nowhere'):
        check_data(cfg)


def test_evaluate__refuses_another_models_checkpoint(run, teacher, tmp_path):
    cfg, _, _ = run
    with pytest.raises(ConfigError, match='not a checkpoint of the student'):
        evaluate(cfg, teacher['checkpoint'], str(tmp_path))


def test_examples__draws_every_model(run):
    cfg, work_dir, _ = run
    rows = examples(
        cfg, {'student': str(work_dir / 'iter_2.pth'), 'distilled': str(work_dir / 'iter_4.pth'), 'teacher': None}, 2
    )
    assert len(rows) == 2
    assert all(set(row) == {'input', 'truth', 'student', 'distilled', 'teacher'} for row in rows)
    assert all(image.shape == (64, 64, 3) and image.dtype == 'uint8' for row in rows for image in row.values())


@pytest.fixture
def detection(data, tmp_path):
    teacher = tiny.detector('GFL', 8)
    path = tiny.saved(teacher, tmp_path / 'teacher.pth', CLASSES[1:])
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.detector('GFL', 4),
        teacher=dict(config=teacher, checkpoint=path),
        distillers=dict(logits=dict(type='LogitKD'), neck=dict(type='FeatureMimic', taps='neck', loss_weight='auto')),
    )
    return tiny.detection_run(model, data)


def test_detection__epoch_based_run_resumes_exactly_and_scores_with_coco(detection, tmp_path):
    record = train(detection, str(tmp_path / 'a'), seed=0)
    assert record.metric == 'bbox_mAP' and [i for i, _ in record.curve] == [4, 8]
    (tmp_path / 'b').mkdir()
    shutil.copy(tmp_path / 'a/epoch_1.pth', tmp_path / 'b')
    train(detection, str(tmp_path / 'b'), seed=0, resume=str(tmp_path / 'b/epoch_1.pth'))
    a, b = weights(tmp_path / 'a/epoch_2.pth'), weights(tmp_path / 'b/epoch_2.pth')
    assert all(torch.equal(v, b['state_dict'][k]) for k, v in a['state_dict'].items())
    metrics = evaluate(detection, str(tmp_path / 'a/epoch_2.pth'), str(tmp_path / 'test'))
    assert 100 * metrics['coco/bbox_mAP'] == pytest.approx(record.value, abs=1e-3)
    rows = examples(detection, {'distilled': record.checkpoint, 'teacher': None}, 1)
    assert set(rows[0]) == {'input', 'truth', 'distilled', 'teacher'}


@pytest.mark.parametrize(
    ('evaluator', 'expected'),
    [
        (dict(type='CocoMetric'), 'coco/bbox_mAP'),
        (dict(type='mmdet.CocoMetric', metric=['bbox', 'segm']), 'coco/bbox_mAP'),
        (dict(type='CocoMetric', metric=['segm', 'bbox']), 'coco/segm_mAP'),
        ([dict(type='DumpResults'), dict(type='CocoMetric', metric='segm')], 'coco/segm_mAP'),
        (dict(type='IoUMetric', iou_metrics=['mIoU']), 'mIoU'),
        (dict(type='DumpResults'), None),
    ],
)
def test_metric__is_the_first_that_the_evaluator_computes(evaluator, expected):
    found = _metric(Config(dict(val_evaluator=evaluator)))
    assert (found and found[0]) == expected
