"""Mean-teacher adaptation of small detectors: pseudo boxes, the terms, runs, checkpoints, resume, data, bad input."""

import copy
import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import InstanceData

from kd_dense.adaptation.paired import PairedDataset
from kd_dense.adaptation.pseudo_boxes import PseudoBoxes, artificial_box
from kd_dense.engine import AdaptationHook
from kd_dense.engine.run import evaluate, load_config, student_alone, train
from kd_dense.errors import ConfigError
from kd_dense.losses.adaptation import style_consistency
from kd_dense.models import MeanTeacherAdaptation
from kd_dense.models.build import build_model, forget_pretrained, model_config
from tests.adaptation.test_pseudo_boxes import selected_by_loops
from tests.adaptation.test_segmentation import DAMAGES, said_when_broken, start
from tests.helpers import tiny
from tests.helpers.processes import assert_equal

VIEWS = ('source', 'styled', 'target', 'teacher')
#: Scores that some boxes of the models of :func:`model_for` reach.
THRESHOLD = {
    'RetinaNet': 0.235,
    'GFL': 0.145,
    'FasterRCNN': 0.3,
    'CascadeRCNN': 0.3,
    'DeformableDETR': 0.96,
    'DINO': 0.96,
}


def batch(views=VIEWS, **options):
    """``styled`` has the labels of ``source``, and ``teacher`` the sizes of ``target``; no two images are equal."""
    torch.manual_seed(0)
    found = {'inputs': {}, 'data_samples': {}}
    for view in views:
        one = tiny.detection_batch(**options)
        if view in ('styled', 'teacher'):
            one['data_samples'] = copy.deepcopy(found['data_samples'][{'styled': 'source', 'teacher': 'target'}[view]])
        for key in found:
            found[key][view] = one[key]
    return found


def head_of(model):
    return model.roi_head if hasattr(model, 'roi_head') else model.bbox_head


def stock_config(kind):
    detectors = {'DeformableDETR': tiny.deformable_detr, 'DINO': tiny.dino}
    return detectors[kind]() if kind in detectors else tiny.detector(kind)


def model_for(kind='RetinaNet', student=None, **options):
    torch.manual_seed(0)
    labels = dict(score_threshold=THRESHOLD[kind]) | options.pop('pseudo_labels', {})
    model = MeanTeacherAdaptation(student or stock_config(kind), pseudo_labels=labels, **options)
    model.init_weights()
    spread(model.student)
    model.mean_teacher.reset(model.student)
    model.progress = 0.5
    return model.train()


def spread(detector):
    """Some predictions are surer than others."""
    for name, module in detector.named_modules():
        with torch.no_grad():
            if name.endswith(('retina_cls', 'gfl_cls')):
                module.weight *= 40
                module.bias.fill_(-2)
            elif name.endswith('fc_cls'):
                module.weight *= 100
            elif 'cls_branches' in name and hasattr(module, 'weight'):
                module.weight *= 5
                module.bias.fill_(0)


def losses(model, data):
    data = model.data_preprocessor(copy.deepcopy(data), True)
    return model(**data, mode='loss'), data


def labels_by_loops(model, seen, threshold, iou=0.3, count=20):
    """Of all that a stock detector predicts, what the rules of the pseudo labels leave; for each image."""
    stock = copy.deepcopy(model.mean_teacher.model).eval()
    head = head_of(stock)
    head.test_cfg = copy.deepcopy(head.test_cfg)
    if 'nms' in head.test_cfg:
        head.test_cfg.update(score_thr=0.0, nms=dict(type='nms', iou_threshold=1.0), max_per_img=10**6)
    view = 'teacher' if 'teacher' in seen['inputs'] else 'target'
    with torch.no_grad():
        found = stock.predict(seen['inputs'][view], copy.deepcopy(seen['data_samples'][view]), rescale=False)
    each = [threshold] * 6 if isinstance(threshold, float) else threshold
    result = []
    for sample in found:
        all_ = sample.pred_instances
        all_ = all_[((all_.bboxes[:, 2:] - all_.bboxes[:, :2]) >= 1).all(1)]
        kept = selected_by_loops(all_.bboxes.tolist(), all_.scores.tolist(), all_.labels.tolist(), each, iou, count)
        result.append(all_[torch.tensor(kept, dtype=torch.long)])
    return result


def labelled(samples, instances):
    samples = copy.deepcopy(samples)
    for sample, one in zip(samples, instances, strict=True):
        sample.gt_instances = InstanceData(bboxes=one.bboxes, labels=one.labels)
    return samples


def trained_on(model):
    """The data samples of every call of the student's loss from now on."""
    calls, loss = [], model.student.loss

    def spy(images, samples):
        calls.append(samples)
        return loss(images, samples)

    model.student.loss = spy
    return calls


# -- the terms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'behaviour'),
    [
        ('RetinaNet', 'fixed'),
        ('GFL', 'official'),
        ('FasterRCNN', 'fixed'),
        ('CascadeRCNN', 'fixed'),
        ('DeformableDETR', 'fixed'),
        ('DINO', 'fixed'),
    ],
)
def test_terms_are_those_of_the_student_alone(kind, behaviour):
    model = model_for(kind, behaviour=behaviour, pseudo_weight=0.3, styled_weight=0.7, consistency_weight=2.0)
    threshold = THRESHOLD[kind]
    own = head_of(model.mean_teacher.model).test_cfg
    before = copy.deepcopy(own)
    data = batch()
    torch.manual_seed(1)  # two-stage detectors draw regions, and DINO noise
    found, seen = losses(model, data)
    assert head_of(model.mean_teacher.model).test_cfg is own and own == before
    stock = copy.deepcopy(model.student)
    torch.manual_seed(1)

    def alone(view, samples=None):
        samples = samples or seen['data_samples'][view]
        return stock.parse_losses(stock(seen['inputs'][view], samples, mode='loss'))[0]

    source, styled = alone('source'), alone('styled')
    torch.testing.assert_close(found['adapt.source_loss'], source)
    torch.testing.assert_close(found['adapt.styled_loss'], 0.7 * styled)
    expected = 2.0 * style_consistency(source, styled, relative=behaviour == 'fixed')
    torch.testing.assert_close(found['adapt.consistency_loss'], expected)
    pseudo = labels_by_loops(model, seen, threshold)
    assert sum(map(len, pseudo)) > 2 and min(map(len, pseudo)) < 20
    target = alone('target', labelled(seen['data_samples']['target'], pseudo))
    torch.testing.assert_close(found['adapt.pseudo_loss'], 0.3 * target, rtol=1e-4, atol=1e-5)
    assert target != alone('target')  # the truth
    report = model.statistics.report()
    assert report['per_image'] == sum(map(len, pseudo)) / 2
    assert report['score'] == pytest.approx(torch.cat([p.scores for p in pseudo]).mean().item(), rel=1e-5)


@pytest.mark.parametrize('kind', ['RetinaNet', 'FasterRCNN'])
def test_gradient_reaches_the_student_only(kind):
    model = model_for(kind, pseudo_weight=1.0)
    found, _ = losses(model, batch())
    before = {k: v.clone() for k, v in model.mean_teacher.model.state_dict().items()}
    found['adapt.pseudo_loss'].backward()
    assert all(p.grad is not None for p in model.student.parameters())
    assert model.student.backbone.conv1.weight.grad.any()
    assert all(p.grad is None for p in model.mean_teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.mean_teacher.model.state_dict().items())


def test_thresholds_below_those_of_the_test_config_and_of_each_class():
    """The head's own would leave out what is below its score_thr."""
    student = tiny.detector()
    student['test_cfg'].update(score_thr=0.9, max_per_img=2)
    each = [0.05, 0.2, 1.0, 0.3, 1.0, 0.1]
    model = model_for(student=student, pseudo_labels=dict(score_threshold=each, iou_threshold=0.5, max_count=30))
    calls = trained_on(model)
    _, seen = losses(model, batch())
    expected = labels_by_loops(model, seen, each, iou=0.5, count=30)
    for sample, one in zip(calls[-1], expected, strict=True):
        torch.testing.assert_close(sample.gt_instances.bboxes, one.bboxes)
        assert torch.equal(sample.gt_instances.labels, one.labels) and len(one) > 2
    assert sum(len(one) for one in expected) == sum(
        n for name, n in model.statistics.report().items() if name.startswith('count.')
    )


def test_without_a_view_of_its_own_the_teacher_sees_the_target():
    model = model_for()
    calls = trained_on(model)
    found, seen = losses(model, batch(views=('source', 'target')))
    for sample, one in zip(calls[-1], labels_by_loops(model, seen, THRESHOLD['RetinaNet']), strict=True):
        torch.testing.assert_close(sample.gt_instances.bboxes, one.bboxes)
    assert 'adapt.styled_loss' not in found and len(calls) == 2


def test_the_truth_of_the_target_is_counted_and_not_trained_on():
    data = batch()
    wrong = copy.deepcopy(data)
    reports, gradients = [], []
    model = model_for()
    _, seen = losses(model, data)
    for sample, pseudo in zip(
        data['data_samples']['target'], labels_by_loops(model, seen, THRESHOLD['RetinaNet']), strict=True
    ):
        sample.gt_instances = InstanceData(bboxes=pseudo.bboxes.clone(), labels=pseudo.labels)
    for sample in wrong['data_samples']['target']:
        sample.gt_instances.bboxes += 1000
    for version in (data, wrong):
        model = model_for(pseudo_weight=1.0)
        found, _ = losses(model, version)
        sum(v for k, v in found.items() if 'loss' in k).backward()
        gradients.append({name: p.grad for name, p in model.student.named_parameters()})
        reports.append(model.statistics.report())
    assert_equal(*gradients)
    assert [report['precision'] for report in reports] == [1, 0]
    assert reports[0]['per_image'] == reports[1]['per_image'] > 0


def test_target_without_labels():
    data = batch()
    for sample in data['data_samples']['target']:
        sample.gt_instances = InstanceData()
    model = model_for()
    found, _ = losses(model, data)
    report = model.statistics.report()
    assert found['adapt.pseudo_loss'] > 0 and report['per_image'] > 0 and 'precision' not in report


def test_loss_counts_as_much_as_the_scores():
    (hard, _), (soft, seen) = (losses(model_for(pseudo_labels=dict(weighting=w)), batch()) for w in ('hard', 'score'))
    score = torch.cat([p.scores for p in labels_by_loops(model_for(), seen, THRESHOLD['RetinaNet'])]).mean()
    torch.testing.assert_close(soft['adapt.pseudo_loss'], score * hard['adapt.pseudo_loss'])
    assert hard['adapt.pseudo_loss'] > 0


@pytest.mark.parametrize('kind', ['GFL', 'FasterRCNN'])
@pytest.mark.parametrize('empty', ['skip', 'background', 'artificial_box'])
def test_nothing_passes(kind, empty):
    model = model_for(kind, pseudo_labels=dict(score_threshold=1.0, empty=empty), pseudo_weight=1.0)
    calls = trained_on(model)
    torch.manual_seed(1)
    found, seen = losses(model, batch())
    sum(v for k, v in found.items() if 'loss' in k).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.student.parameters())
    assert model.statistics.report()['per_image'] == 0
    boxes = [sample.gt_instances.bboxes for sample in calls[-1]]
    if empty == 'artificial_box':
        box = boxes[0][0].tolist()
        assert [len(b) for b in boxes] == [1, 0] and calls[-1][0].gt_instances.labels.tolist() == [0]
        assert ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) == pytest.approx((32, 32), abs=1e-4)
    else:
        assert [b.shape for b in boxes] == [(0, 4)] * 2
    assert (found['adapt.pseudo_loss'] == 0) == (empty == 'skip')


def test_the_released_code_makes_up_a_box():
    assert (
        model_for().labels.options.empty == 'skip'
        and model_for(behaviour='official').labels.options.empty == 'artificial_box'
    )
    model = model_for(behaviour='official', pseudo_labels=dict(score_threshold=1.0))
    assert model.mean_teacher.buffers == 'keep'
    calls = trained_on(model)
    data = batch()
    torch.manual_seed(5)
    losses(model, data)
    expected = artificial_box((64, 64), torch.Generator().manual_seed(5), torch.zeros(0))
    assert torch.equal(calls[-1][0].gt_instances.bboxes, expected.boxes)


def test_what_has_no_weight_is_not_run():
    model = model_for(pseudo_weight=dict(value=1.0, start=0.6), styled_weight=0, consistency_weight=0)
    calls = trained_on(model)
    found, _ = losses(model, batch())
    assert len(calls) == 1 and found['adapt.pseudo_loss'] == 0 and 'adapt.styled_loss' not in found
    assert model.statistics.report() == {}
    assert model_for().weights['pseudo'](0.5) == 0.005  # as in SSDA-YOLO


# -- geometry ----------------------------------------------------------------------------------------------------------


def matrices(data, view, *each):
    for sample, matrix in zip(data['data_samples'][view], each, strict=True):
        sample.set_metainfo(dict(homography_matrix=np.array(matrix, np.float32)))


def flip(width, scale=1.0):
    return [[-scale, 0, scale * width], [0, scale, 0], [0, 0, 1]]


def test_boxes_of_a_mirrored_and_enlarged_view():
    """The teacher sees the target twice as large and mirrored; the student learns where things are in its own view."""
    data = batch()
    data['inputs']['teacher'] = [
        torch.nn.functional.interpolate(x[None].float().flip(3), scale_factor=2.0).squeeze(0).byte()
        for x in data['inputs']['target']
    ]
    for sample in data['data_samples']['teacher']:
        sample.set_metainfo(dict(img_shape=tuple(2 * n for n in sample.img_shape)))
        sample.gt_instances = InstanceData()
    matrices(data, 'target', np.eye(3), np.eye(3))
    matrices(data, 'teacher', flip(64, 2.0), flip(64, 2.0))
    model = model_for()
    calls = trained_on(model)
    _, seen = losses(model, data)
    for sample, one in zip(calls[-1], labels_by_loops(model, seen, THRESHOLD['RetinaNet']), strict=True):
        x1, y1, x2, y2 = one.bboxes.unbind(1)
        back = torch.stack([64 - x2 / 2, y1 / 2, 64 - x1 / 2, y2 / 2], 1)
        back = back[(back[:, 2:] - back[:, :2] >= 1).all(1)]
        torch.testing.assert_close(sample.gt_instances.bboxes, back, rtol=1e-5, atol=1e-4)
        assert len(back) > 2


def test_a_crop_of_another_view_and_equal_geometry():
    data = batch()
    matrices(data, 'target', np.eye(3), np.eye(3))
    matrices(data, 'teacher', np.eye(3), np.eye(3))
    model = model_for()
    calls = trained_on(model)
    losses(model, data)
    whole = [sample.gt_instances.bboxes for sample in calls[-1]]
    # the same geometry of a crop from the upper left corner
    data['inputs']['target'] = [x[:, :, :16] for x in data['inputs']['target']]
    for sample in data['data_samples']['target']:
        sample.set_metainfo(dict(img_shape=(sample.img_shape[0], 16)))
        sample.gt_instances = InstanceData()
    losses(model, data)
    for sample, boxes in zip(calls[-1], whole, strict=True):
        expected = boxes.clamp(max=torch.tensor([16.0, 64, 16, 64]))
        expected = expected[expected[:, 2] - expected[:, 0] >= 1]
        torch.testing.assert_close(sample.gt_instances.bboxes, expected)
    assert any(len(a) != len(b.gt_instances.bboxes) for a, b in zip(whole, calls[-1], strict=True))


def test_views_of_different_sizes_that_nothing_relates():
    data = batch()
    data['inputs']['teacher'] = [x[:, :32] for x in data['inputs']['teacher']]
    for sample in data['data_samples']['teacher']:
        sample.set_metainfo(dict(img_shape=(32, 64)))
        sample.gt_instances = InstanceData()
    with pytest.raises(ConfigError, match=r"img_shape \(64, 64\) and \(32, 64\); .*shared, or 'homography_matrix'"):
        losses(model_for(), data)


def test_a_view_that_is_mirrored_alone():
    """Equal sizes, and boxes that would be taken over as they are."""
    data = batch()
    for sample in data['data_samples']['target']:
        sample.set_metainfo(dict(flip=True, flip_direction='horizontal'))
    for sample in data['data_samples']['teacher']:
        sample.set_metainfo(dict(flip=False, flip_direction=None))
    with pytest.raises(ConfigError, match=r'target and teacher of an image have the flip True and False; put geom'):
        losses(model_for(), data)
    matrices(data, 'target', flip(64), flip(64))
    matrices(data, 'teacher', np.eye(3), np.eye(3))
    found, _ = losses(model_for(), data)
    assert found['adapt.pseudo_loss'] > 0


def test_boxes_as_objects():
    """Some data preprocessors leave MMDetection's own kind of boxes to the detector."""
    from mmdet.structures.bbox import HorizontalBoxes

    data = batch()
    for view in VIEWS:
        for sample in data['data_samples'][view]:
            sample.gt_instances.bboxes = HorizontalBoxes(sample.gt_instances.bboxes)
    model = model_for()
    model.data_preprocessor.own.boxtype2tensor = False
    calls = trained_on(model)
    found, _ = losses(model, data)
    assert isinstance(calls[-1][0].gt_instances.bboxes, HorizontalBoxes)
    tensors, _ = losses(model_for(), batch())
    torch.testing.assert_close(found['adapt.pseudo_loss'], tensors['adapt.pseudo_loss'])


# -- steps -------------------------------------------------------------------------------------------------------------


def test_accumulation_gives_the_teacher_of_a_large_batch():
    """Each image is in the large batch twice: the loss of a detector is a mean over objects, not over images."""
    student = tiny.detector('GFL')
    student['backbone']['norm_cfg'] = student['bbox_head']['norm_cfg'] = dict(type='GN', num_groups=2)
    once = batch(sizes=(tiny.SIZE,))
    twice = {key: {view: 2 * once[key][view] for view in VIEWS} for key in once}
    states = []
    for data, count in ((once, 2), (twice, 1)):
        model = model_for('GFL', student=student, mean_teacher=dict(decay=0.5), pseudo_weight=1.0)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01), accumulative_counts=count)
        runner = SimpleNamespace(model=model, optim_wrapper=wrapper, iter=0, max_iters=2 * count)
        wrapper.initialize_count_status(model, 0, 2 * count)
        hook = AdaptationHook(interval=1000)
        for runner.iter in range(2 * count):
            hook.before_train_iter(runner, runner.iter)
            model.train_step(copy.deepcopy(data), wrapper)
            hook.after_train_iter(runner, runner.iter)
        states.append(model.mean_teacher.state_dict() | {f'student.{k}': v for k, v in model.state_dict().items()})
    assert int(states[0]['updates']) == 2
    for name, value in states[0].items():
        torch.testing.assert_close(
            value, states[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f'{n}: {text}'
        )


def test_a_collapsed_teacher_is_reported(monkeypatch):
    said = []
    monkeypatch.setattr('kd_dense.engine.adaptation_hook.print_log', lambda text, *_: said.append(text))
    model, hook = model_for(), AdaptationHook(interval=1)
    scalars = {}
    runner = SimpleNamespace(
        model=model,
        iter=0,
        optim_wrapper=SimpleNamespace(should_update=lambda: False),
        message_hub=SimpleNamespace(update_scalar=scalars.__setitem__),
    )
    one = torch.tensor([[0.0, 0, 9, 9]])
    for boxes in (10, 9, 0):
        model.statistics.reset()
        pseudo = PseudoBoxes(one.repeat(boxes, 1), torch.ones(boxes), torch.zeros(boxes).long(), torch.ones(boxes))
        model.statistics.update(pseudo, 0)
        hook.after_train_iter(runner, 0)
        assert scalars['train/adapt.per_image'] == boxes and len(said) == (not boxes)
    assert said[0].startswith('the mean teacher finds 0 pseudo labels where it once found 10: it collapses')


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def domains(tmp_path_factory):
    """Scenes, and others that are pale and bright."""
    root = tmp_path_factory.mktemp('domains')
    source, target = tiny.scenes(root / 'source'), tiny.scenes(root / 'target')
    for file in (target / 'images').rglob('*.*'):
        image = cv2.imread(str(file)).astype(np.float32) * 0.5 + 110
        file.unlink()  # it may be linked
        cv2.imwrite(str(file), image.astype(np.uint8))
    return source, target


def adaptation_config(domains, kind='GFL', labelled_target=True, **model):
    """By epochs of four iterations."""
    source, target = map(str, domains)
    model = dict(dict(type='kd_dense.MeanTeacherAdaptation', student=tiny.detector(kind)), **model)
    cfg = tiny.detection_run(model, domains[0], 1)
    load, annotations = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)
    geometry = [
        dict(type='RandomResize', scale=(64, 64), ratio_range=(0.8, 1.2), keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
    ]
    pack = [dict(type='PackDetInputs')]
    styled = dict(type='kd_dense.StyleTransfer', folder=f'{target}/images/train', method='color')
    back = dict(type='kd_dense.StyleTransfer', folder=f'{source}/images/train', method='color')
    data = dict(
        type='CocoDataset',
        metainfo=cfg.metainfo,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train/'),
        indices=[0, 1],
    )
    unlabelled = dict(type='kd_dense.ImageFolder', data_prefix=dict(img_path='images/train'), indices=[0, 1, 2, 3])
    cfg.train_dataloader.dataset = dict(
        type='kd_dense.PairedDataset',
        source=dict(
            data,
            data_root=source,
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[load, annotations, *geometry],
                    views=dict(source=pack, styled=[styled, *pack]),
                )
            ],
        ),
        target=dict(
            dict(data, indices=[0, 1, 2, 3]) if labelled_target else unlabelled,
            data_root=target,
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[load, *([annotations] if labelled_target else []), *geometry],
                    views=dict(target=[dict(type='PhotoMetricDistortion'), *pack], teacher=[back, *pack]),
                )
            ],
        ),
    )
    for part in ('val_dataloader', 'test_dataloader'):
        cfg[part].dataset.data_root = f'{target}/'
    for part in ('val_evaluator', 'test_evaluator'):
        cfg[part].ann_file = f'{target}/annotations/instances_val.json'
    cfg.custom_hooks = [dict(type='kd_dense.AdaptationHook', interval=2)]
    return cfg


def by_iterations(cfg, iterations=4, interval=2):
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.pop('batch_sampler')
    for part in (cfg.train_dataloader.dataset.source, cfg.train_dataloader.dataset.target):
        part.pop('indices')
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=interval)
    cfg.param_scheduler = [dict(type='PolyLR', eta_min=1e-5, by_epoch=False, begin=0, end=iterations)]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=interval, max_keep_ckpts=10)
    cfg.log_processor = dict(by_epoch=False)
    return cfg


def content(path):
    whole = torch.load(path, weights_only=False, map_location='cpu')
    return {k: whole[k] for k in ('state_dict', 'optimizer', 'kd_dense', 'kd_dense_random_state')}


def scalars(work):
    (file,) = work.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope='module')
def whole(domains, tmp_path_factory):
    """Four iterations, gradients of two accumulated."""
    work = tmp_path_factory.mktemp('whole') / 'run'
    labels = dict(score_threshold=0.005)
    cfg = adaptation_config(domains, pseudo_labels=labels, mean_teacher=dict(decay=0.9), pseudo_weight=0.5)
    cfg = by_iterations(cfg)
    cfg.optim_wrapper.accumulative_counts = 2
    return cfg, work, train(cfg, str(work), seed=3)


def test_a_run_logs_everything_and_ends_with_a_plain_student(whole, tmp_path):
    cfg, work, record = whole
    lines = scalars(work)
    steps = [line for line in lines if 'adapt.source_loss' in line]
    assert len(steps) == 4
    for line in steps:
        terms = [line[f'adapt.{name}_loss'] for name in ('source', 'styled', 'pseudo', 'consistency')]
        assert all(map(math.isfinite, terms)) and line['loss'] == pytest.approx(sum(terms), rel=1e-3)
        assert line['adapt.pseudo_loss'] > 0
    assert 0 < steps[1]['adapt.per_image'] <= 20 and 0 <= steps[1]['adapt.precision'] <= 1
    assert 0.005 < steps[1]['adapt.score'] < 1
    scores = [line for line in lines if 'teacher.coco/bbox_mAP' in line]
    assert len(scores) == 2
    (log,) = work.glob('*/*.log')
    (said, _) = re.findall('pseudo labels since the last validation: (per_image .*)', log.read_text())
    assert all(f', count.{name} ' in said for name in cfg.metainfo.classes) and ', precision.' in said
    found = evaluate(cfg, str(work / 'iter_4.pth'), str(tmp_path))
    assert 100 * found['coco/bbox_mAP'] == pytest.approx(record.value)


def test_mmdetection_loads_the_checkpoint(whole, domains):
    """As its users do, from the config of the student; it predicts as the student in the run does."""
    from mmdet.apis import inference_detector, init_detector

    cfg, work, _ = whole
    stock = student_alone(cfg)
    detector = init_detector(stock, str(work / 'iter_4.pth'), device='cpu', palette='random')
    weights = torch.load(work / 'iter_4.pth', weights_only=False)['state_dict']
    assert_equal(dict(detector.state_dict()), weights)
    assert detector.dataset_meta['classes'] == cfg.metainfo.classes
    file = next((domains[1] / 'images/val').iterdir())
    assert len(inference_detector(detector, str(file)).pred_instances.bboxes) > 0


def test_a_resumed_run_ends_like_one_that_did_not_stop(whole, tmp_path):
    cfg, work, _ = whole
    train(cfg, str(tmp_path / 'part'), seed=3, resume=str(work / 'iter_2.pth'))
    assert_equal(content(work / 'iter_4.pth'), content(tmp_path / 'part' / 'iter_4.pth'))
    states = [content(work / f'iter_{i}.pth')['kd_dense']['mean_teacher'] for i in (2, 4)]
    assert [int(s['updates']) for s in states] == [1, 2]
    assert not torch.equal(*(s['model.backbone.layer1.0.conv1.weight'] for s in states))


@pytest.mark.slow
def test_killed_and_resumed(domains, tmp_path):
    """In the second epoch; the first one ends with the gradients of one of three iterations."""
    labels = dict(score_threshold=0.005)
    cfg = adaptation_config(domains, pseudo_labels=labels, pseudo_weight=0.5, mean_teacher=dict(decay=0.9))
    cfg.train_cfg.max_epochs = 2
    cfg.optim_wrapper.accumulative_counts = 3
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert start(cfg, whole) == 0, whole.with_suffix('.log').read_text()[-2000:]
    assert start(cfg, part, kill_at=7) == -9
    assert sorted(path.name for path in part.glob('*.pth')) == ['epoch_1.pth']
    assert start(cfg, part) == 0, part.with_suffix('.log').read_text()[-2000:]
    first, second = content(whole / 'epoch_2.pth'), content(part / 'epoch_2.pth')
    assert_equal(first, second)
    assert int(first['kd_dense']['mean_teacher']['updates']) == 3  # the last one of two iterations
    assert (whole / 'curve.json').read_text() == (part / 'curve.json').read_text()


def test_a_two_stage_detector_by_epochs_on_a_target_without_labels(domains, tmp_path):
    labels = dict(score_threshold=0.1)
    cfg = adaptation_config(
        domains, 'FasterRCNN', labelled_target=False, pseudo_labels=labels, pseudo_weight=dict(value=1.0, start=0.5)
    )
    cfg.custom_hooks[0].save = 'mean_teacher'
    train(cfg, str(tmp_path / 'run'), seed=3)
    lines = scalars(tmp_path / 'run')
    steps = [line for line in lines if 'adapt.source_loss' in line]
    assert [line['adapt.pseudo_loss'] > 0 for line in steps] == [False, False, True, True]
    assert 'adapt.per_image' in steps[-1] and 'adapt.precision' not in steps[-1]
    assert all(math.isfinite(line['loss']) and 'acc' in line for line in steps)
    (teacher,) = [line['teacher.coco/bbox_mAP'] for line in lines if 'teacher.coco/bbox_mAP' in line]
    found = evaluate(cfg, str(tmp_path / 'run' / 'epoch_1.pth'), str(tmp_path / 'test'))
    assert found['coco/bbox_mAP'] == pytest.approx(teacher)


def test_source_alone(domains):
    adaptation = adaptation_config(domains)
    cfg = student_alone(adaptation)
    assert cfg.model.type == 'GFL' and cfg.custom_hooks == [] and cfg.train_dataloader.dataset.type == 'CocoDataset'
    kinds = ['LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomFlip', 'PackDetInputs']
    assert [t.type for t in cfg.train_dataloader.dataset.pipeline] == kinds
    assert cfg.train_dataloader.dataset.data_root == str(domains[0])


# -- data --------------------------------------------------------------------------------------------------------------


def paired(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = cfg.train_dataloader.dataset
        return PairedDataset(dataset.source, dataset.target)


def test_views_share_geometry_and_boxes(domains):
    pairs = paired(adaptation_config(domains))
    assert len(pairs) == 8 and pairs.get_data_info(5) == pairs.datasets[0].get_data_info(1)
    sizes = set()
    for i in range(8):
        images, samples = pairs[i].values()
        assert list(images) == list(VIEWS)
        for first, second in (('source', 'styled'), ('target', 'teacher')):
            one, other = samples[first], samples[second]
            assert one.img_shape == other.img_shape == tuple(images[second].shape[1:]) and one.flip == other.flip
            assert torch.equal(one.gt_instances.bboxes.tensor, other.gt_instances.bboxes.tensor)
            sizes.add(one.img_shape)
    assert len(sizes) > 2  # images of a batch differ in size


def test_a_folder_of_images(domains, tmp_path):
    folder = domains[1] / 'images'
    for scope, pack in (('mmdet', 'PackDetInputs'), ('mmseg', 'PackSegInputs')):
        config = dict(
            type='kd_dense.ImageFolder',
            data_root=str(domains[1]),
            data_prefix=dict(img_path='images'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='RandomFlip', prob=1.0),
                dict(type='RandomCrop', crop_size=(32, 32)),
                dict(type='PhotoMetricDistortion'),
                dict(type=pack),
            ],
        )
        with DefaultScope.overwrite_default_scope(scope):
            dataset = DATASETS.build(config)
            assert [info['img_path'] for info in map(dataset.get_data_info, range(12))] == sorted(
                str(f) for f in folder.rglob('*.*')
            )
            first = DATASETS.build(dict(config, suffix=Path(dataset.get_data_info(0)['img_path']).name))
            assert len(first) < 12 and first.get_data_info(0)['img_path'] == dataset.get_data_info(0)['img_path']
            assert len(dataset) == 12 and dataset[3]['inputs'].shape == (3, 32, 32)
            for where, message in (('nowhere', 'there is no folder'), ('empty', 'there are no images in')):
                (tmp_path / 'empty').mkdir(exist_ok=True)
                with pytest.raises(ConfigError, match=f'ImageFolder.data_prefix.img_path: {message} .*{where}'):
                    DATASETS.build(dict(config, data_root=str(tmp_path), data_prefix=dict(img_path=where)))


def test_a_domain_that_is_not_there(domains, tmp_path):
    cfg = adaptation_config(domains, labelled_target=False)
    cfg.train_dataloader.dataset.target.data_root = str(tmp_path)
    with pytest.raises(ConfigError, match='dataset.target.data_prefix.img_path: there is no folder .*images/train'):
        train(cfg, str(tmp_path / 'run'), seed=3)
    cfg = adaptation_config(domains)
    cfg.train_dataloader.dataset.target.data_root = str(tmp_path)
    with pytest.raises(ConfigError, match='dataset.target.ann_file: there is no file .*instances_train.json'):
        train(cfg, str(tmp_path / 'run'), seed=3)
    cfg = adaptation_config(domains)
    cfg.train_dataloader.dataset.source.data_root = str(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match='dataset.source.data_root: there is no folder .*nowhere'):
        train(cfg, str(tmp_path / 'run'), seed=3)


@pytest.mark.parametrize('damage', [DAMAGES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES[1:])])
def test_images_that_go_while_training(domains, tmp_path, damage):
    with said_when_broken(domains, tmp_path, 'images/train', *damage) as copies:
        train(adaptation_config(copies, labelled_target=False), str(tmp_path / 'run'), seed=3)


def test_a_target_without_images(domains, tmp_path):
    empty = tmp_path / 'none.json'
    whole = json.loads((domains[1] / 'annotations/instances_train.json').read_text())
    empty.write_text(json.dumps(dict(whole, images=[], annotations=[])))
    cfg = adaptation_config(domains)
    cfg.train_dataloader.dataset.target.update(ann_file=str(empty), indices=None)
    with pytest.raises(ConfigError, match='train_dataloader.dataset.target: CocoDataset has no images'):
        paired(cfg)


def test_a_target_filtered_by_labels_or_with_other_classes(domains):
    cfg = adaptation_config(domains)
    cfg.train_dataloader.dataset.target.filter_cfg = dict(filter_empty_gt=True, min_size=32)
    with pytest.raises(ConfigError, match='target.filter_cfg: filter_empty_gt=True leaves out images by labels'):
        paired(cfg)
    cfg = adaptation_config(domains)
    cfg.train_dataloader.dataset.target.metainfo = dict(classes=('disc', 'ring'))
    with pytest.raises(ConfigError, match='target: has the classes disc, ring and the source disc, ring, triangle'):
        paired(cfg)


# -- options -----------------------------------------------------------------------------------------------------------


def with_batch_resize():
    student = tiny.detector()
    augment = dict(type='BatchSyncRandomResize', random_size_range=(32, 96), size_divisor=32)
    student['data_preprocessor']['batch_augments'] = [augment]
    return student


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(pseudo_labels=dict(threshold=0.5)), "has no option 'threshold'; did you mean .*'score_threshold'"),
        (dict(pseudo_labels=dict(score_threshold=50)), 'score_threshold: must be a number between 0 and 1'),
        (dict(pseudo_labels=dict(score_threshold=[0.5] * 5)), 'score_threshold: has 5 thresholds and .* 6 classes'),
        (dict(pseudo_labels=dict(iou_threshold=2)), 'pseudo_labels.iou_threshold: must lie between 0 and 1'),
        (dict(pseudo_labels=dict(max_count=0)), 'pseudo_labels.max_count: must be a number >= 1'),
        (dict(pseudo_labels=dict(weighting='share')), "pseudo_labels.weighting: unknown weighting 'share'"),
        (dict(pseudo_labels=dict(empty='nothing')), "pseudo_labels.empty: unknown empty 'nothing'"),
        (dict(student=tiny.detector('MaskRCNN')), 'student: MaskRCNN predicts masks'),
        (dict(student=with_batch_resize()), 'data_preprocessor.batch_augments: BatchSyncRandomResize may draw'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MeanTeacherAdaptation(**(dict(student=tiny.detector()) | options))


def test_it_is_the_student_to_its_surroundings():
    model = model_for()
    stock = build_model(tiny.detector(), 'student')
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.load_state_dict(stock.state_dict(), strict=True)
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.student.parameters()}
    assert model.bbox_head is model.student.bbox_head


# -- configs -----------------------------------------------------------------------------------------------------------


def annotations(scenes, split, file, names, categories):
    """Those of :func:`tiny.scenes` under other file names and categories; objects of further classes are left out."""
    whole = json.loads((scenes / f'annotations/instances_{split}.json').read_text())
    whole['images'] = [dict(image, file_name=name) for image, name in zip(whole['images'], names, strict=True)]
    known = dict(zip(sorted(c['id'] for c in whole['categories']), categories))
    whole['annotations'] = [
        dict(a, category_id=known[a['category_id']][0]) for a in whole['annotations'] if a['category_id'] in known
    ]
    whole['categories'] = [dict(id=i, name=name) for i, name in categories]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole))


def test_the_config_of_camvid(domains, tmp_path, monkeypatch):
    """It trains as it is on files of the layout that its header makes, and so does its baseline."""
    name = 'configs/adaptation/detection/meanteacher_gfl_r18-w16_camvid-to-fog.py'
    text = Path(name).read_text()
    assert f'python tools/train.py {name}' in text
    config = load_config(name)
    switches = re.findall(r'(?:model|train_dataloader)(?:\.\w+)+(?==)', text.partition('_base_')[0])
    assert len(switches) == 7
    for switch in switches:  # a name that the config does not have would be taken without a word
        functools.reduce(lambda part, key: part[int(key) if key.isdigit() else key], switch.split('.'), config)
    clear, made = tmp_path / 'camvid', tmp_path / 'made'
    clear.mkdir()
    made.mkdir()
    (clear / 'images').symlink_to(domains[0] / 'images')
    (made / 'fog').symlink_to(domains[1] / 'images')
    for split in ('train', 'val'):
        names = [Path(f).name for f in sorted((domains[0] / f'images/{split}').iterdir())]
        classes = [(1, 'car'), (2, 'pedestrian'), (3, 'bicyclist')]
        annotations(domains[1], split, made / f'annotations/{split}.json', names, classes)
    monkeypatch.setenv('KD_DENSE_CAMVID', str(clear))
    monkeypatch.setenv('KD_DENSE_CAMVID_ADAPTATION', str(made))
    options = {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1, 'train_dataloader.batch_size': 2}
    cfg = load_config(name, {**options, 'default_hooks.checkpoint.interval': 1})
    train(cfg, str(tmp_path / 'run'), seed=0)
    assert [line for line in scalars(tmp_path / 'run') if 'teacher.coco/bbox_mAP' in line]
    alone = student_alone(cfg).train_dataloader.dataset
    assert (alone.type, alone.data_prefix.img) == ('CocoDataset', f'{clear}/images/train')
    assert model_config(name, 'teacher.config').type == 'GFL'  # of another student


@pytest.mark.slow
def test_the_config_of_cityscapes(domains, tmp_path):
    name = 'configs/adaptation/detection/meanteacher_faster-rcnn_r50_cityscapes-to-foggy.py'
    assert f'python tools/train.py {name}' in Path(name).read_text()
    root = tmp_path / 'cityscapes'
    classes = ('person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle')
    ids = list(zip((24, 25, 26, 27, 28, 31, 32, 33), classes, strict=True))
    for side, (folder, suffix, stem) in enumerate(
        [
            ('leftImg8bit', '_leftImg8bit', 'instancesonly_filtered_gtFine'),
            ('leftImg8bit_foggy', '_leftImg8bit_foggy_beta_0.02', 'foggy'),
        ]
    ):
        for split in ('train', 'val'):
            names = []
            for file in sorted((domains[side] / f'images/{split}').iterdir()):
                names.append(f'city/{file.stem}{suffix}{file.suffix}')
                (root / folder / split / 'city').mkdir(parents=True, exist_ok=True)
                (root / folder / split / names[-1]).symlink_to(file)
            annotations(domains[side], split, root / f'annotations/{stem}_{split}.json', names, ids)
    text = Path(name).read_text().replace("'data/cityscapes'", repr(str(root)))
    (tmp_path / 'config.py').write_text(text.replace('(1200, 600)', '(64, 64)'))
    options = {
        'train_cfg.max_iters': 1,
        'train_cfg.val_interval': 1,
        'default_hooks.checkpoint.interval': 1,
        'default_hooks.logger.interval': 1,
        'model.pseudo_weight': 1.0,
        'model.pseudo_labels.score_threshold': 0.0,
    }
    cfg = load_config(str(tmp_path / 'config.py'), options)
    forget_pretrained(cfg.model.student)
    for part in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[part].update(num_workers=0, persistent_workers=False)
    train(cfg, str(tmp_path / 'run'), seed=0)
    lines = scalars(tmp_path / 'run')
    assert [line for line in lines if 'teacher.coco/bbox_mAP_50' in line]
    assert [line['adapt.pseudo_loss'] > 0 for line in lines if 'adapt.pseudo_loss' in line] == [True]
