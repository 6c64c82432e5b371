"""The benchmark on configs of MMSegmentation and MMDetection: are the steps those of the training?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_dense import ConfigError, Distillation
from kd_dense.analysis.benchmark import Options, Variant, benchmark
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.engine.benchmark import MMBench, _without_files, image_size, made_up_batch
from kd_dense.execution import current_precision
from kd_dense.models.build import build_model
from tests.helpers import tiny

RANDOM = Options(random_teacher=True)
#: Every level of the neck has more than one cell.
LARGE = Options((128, 160), random_teacher=True)


def distillation(student: dict, teacher: dict, **distillers: dict) -> dict:
    teacher = dict(config=teacher, checkpoint='nowhere.pth')
    return dict(type='kd_dense.Distillation', student=student, teacher=teacher, distillers=distillers)


@pytest.fixture
def segmentation() -> Config:
    distillers = dict(
        logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.1)),
        mimic=dict(type='FeatureMimic', taps='backbone:3', loss_weight=dict(start=0.5)),
    )
    return tiny.segmentation_run(distillation(tiny.segmentor(4), tiny.segmentor(8), **distillers), Path('nowhere'))


def detection(kind: str = 'GFL', **distillers: dict) -> Config:
    distillers = distillers or dict(neck=dict(type='NFD', taps='neck'))
    model = distillation(tiny.detector(kind, 4), tiny.detector(kind, 8), **distillers)
    return tiny.detection_run(model, Path('nowhere'))


def resized(cfg: Config, *transforms: dict) -> Config:
    cfg.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), *transforms]
    return cfg


# -- steps -------------------------------------------------------------------------------------------------------------


def test_facts_and_batch(segmentation):
    bench = MMBench(segmentation, RANDOM)
    facts = bench.prepare()
    student, teacher = (build_model(tiny.segmentor(width), 'model') for width in (4, 8))
    assert (facts.toolbox, facts.image_size, facts.batch, facts.optimizer) == ('mmseg', (64, 64), 2, 'AdamW')
    assert facts.student_parameters == sum(p.numel() for p in student.parameters())
    assert facts.teacher_parameters == sum(p.numel() for p in teacher.parameters())
    assert facts.random_teacher and facts.precision == 'fp32' and facts.device == 'cpu'
    labels = torch.stack([s.gt_sem_seg.data for s in bench.batch['data_samples']])
    assert bench.batch['inputs'].shape == (2, 3, 64, 64) and labels.shape == (2, 1, 64, 64)
    assert set(labels.unique().tolist()) <= {*range(7), 255} and (labels != 255).float().mean() > 0.8


def test_forwards_are_those_of_the_training(segmentation):
    """Every distiller takes part, whatever its schedule; the loss is what the runner would minimise."""
    segmentation.model.distillers.logits.loss_weight = 2.0
    bench = MMBench(segmentation, RANDOM)
    bench.prepare()
    with bench.variant(bench.distillers(), ['mmrazor-style']) as works:
        assert list(works) == ['student', 'teacher', 'step', 'mmrazor-style']
        model = bench.toolbox.model
        found = {}
        for name in ('student', 'step', 'mmrazor-style'):
            torch.manual_seed(0)  # of dropout
            found[name] = float(works[name].forward().detach())
        torch.manual_seed(0)
        losses = model._run_forward(bench.batch, mode='loss')
        total, log = model.parse_losses(losses)
        assert set(log) >= {'kd.logits.loss', 'kd.mimic.loss', 'decode.loss_ce'}
        assert found['step'] == pytest.approx(float(total), rel=1e-5)
        assert found['student'] == pytest.approx(float(log['decode.loss_ce']), rel=1e-5)
        assert float(log['kd.mimic.loss']) > 0.01 * found['student']
        assert found['mmrazor-style'] > found['student']
        assert works['teacher'].forward() is None and works['teacher'].update is None


def test_updates_leave_everything_as_it_was(segmentation, monkeypatch):
    bench = MMBench(segmentation, RANDOM)
    bench.prepare()
    made, original = {}, bench._optimizer
    monkeypatch.setattr(bench, '_optimizer', lambda model: made.setdefault(model, original(model)))
    with bench.variant(bench.distillers(), []) as works:
        model = bench.toolbox.model
        before = [p.clone() for p in model.parameters()]
        for work in works.values():
            work()
            work()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())
        # the first step calibrated 'auto', and proved that the connectors learn
        assert not model.distillers.weights['logits'].needs_calibration and not model.distillers._pending
    for trained in (bench.toolbox.student, model):  # the optimizer of the config has stepped on all of it, twice
        optimizer = made[trained].optimizer
        assert type(optimizer).__name__ == segmentation.optim_wrapper.optimizer.type
        assert {p for g in optimizer.param_groups for p in g['params']} == set(trained.parameters())
        assert {int(state['step']) for state in optimizer.state.values()} == {2}
    assert set(model.distillers.parameters()) and set(model.distillers.parameters()) <= set(model.parameters())


def test_only_mmrazor_runs_the_teacher_to_its_loss(monkeypatch):
    cfg = detection()
    bench = MMBench(cfg, LARGE)
    bench.prepare()
    calls = []
    head = type(bench.toolbox.teacher.bbox_head)
    original = {name: getattr(head, name) for name in ('forward', 'loss')}
    for name, function in original.items():

        def spy(self, *args, name=name, function=function, **kwargs):
            calls.append((name, self.training, any(p.requires_grad for p in self.parameters())))
            return function(self, *args, **kwargs)

        monkeypatch.setattr(head, name, spy)
    with bench.variant(bench.distillers(), ['mmrazor-style']) as works:
        calls.clear()
        works['teacher']()
        assert calls == []
        works['step']()
        assert calls == [('loss', True, True), ('forward', True, True)]  # of the student
        calls.clear()
        works['mmrazor-style']()
        teacher, student = calls[:2], calls[2:]
        assert teacher == [('loss', True, False), ('forward', True, False)]
        assert student == [('loss', True, True), ('forward', True, True)]
        rival = works['mmrazor-style'].modules[0]
        ours, theirs = rival.kept  # until the next step, as its recorders keep them
        assert len(ours['neck']) == len(theirs['neck']) == 5
        norms = [m for m in rival.teacher.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and not any(m.training for m in norms) and rival.teacher.model.training
        assert not any(getattr(m, 'inplace', False) for m in rival.teacher.model.modules())
        assert not bench.toolbox.teacher.training  # ours is another one


def test_cached_step_has_the_same_loss_without_a_teacher():
    bench = MMBench(detection(), LARGE)
    bench.prepare()
    with bench.variant(bench.distillers(), ['cached']) as works:
        assert list(works) == ['student', 'teacher', 'step', 'cached']
        (model,) = works['cached'].modules
        assert model.teacher.model is None and model.student is bench.toolbox.student
        ours, cached = (works[name].forward() for name in ('step', 'cached'))
        assert float(cached) == pytest.approx(float(ours), rel=1e-3) and float(ours) > float(works['student'].forward())
        works['cached']()
        assert not model.distillers._pending
        shard = next(model.teacher.cache.folder.glob('*.safetensors'))
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ConfigError, match='was damaged'):  # it is read, and checked, in every step
            works['cached']()
    assert not shard.exists()


def test_cached_step_of_what_is_not_per_image__one_sentence():
    bench = MMBench(detection('FasterRCNN'), LARGE)
    bench.prepare()
    with (
        pytest.raises(ConfigError, match=r'--against cached: the tap .* can not be cached.*; leave it out'),
        bench.variant(dict(roi=dict(type='RoIKD')), ['cached']),
    ):
        pass


@pytest.mark.parametrize('kind, stages', [('FasterRCNN', 1), ('CascadeRCNN', 3)])
def test_the_teacher_includes_its_roi_head_on_the_regions_of_the_student(kind, stages, monkeypatch):
    """RoIKD asks for it after the student's forward; it is no overhead of the distiller."""
    bench = MMBench(detection(kind, roi=dict(type='RoIKD')), LARGE)
    bench.prepare()
    with bench.variant(bench.distillers(), []) as works:
        model, calls = bench.toolbox.model, []
        head = type(bench.toolbox.teacher.roi_head)
        original = head._bbox_forward

        def spy(self, *args):
            if self is bench.toolbox.teacher.roi_head:
                calls.append((args[-1].shape, [x.shape for x in args[-2]]))
            return original(self, *args)

        monkeypatch.setattr(head, '_bbox_forward', spy)
        works['teacher']()
        alone = list(calls)
        calls.clear()
        works['step']()
        assert len(alone) == stages and alone == calls
        assert 'context' not in vars(model)
    with bench.variant(dict(neck=dict(type='NFD', taps='neck')), []) as works:
        calls.clear()
        works['teacher']()
        works['step']()
        assert calls == []


@pytest.mark.parametrize('kind', ['GFL', 'FasterRCNN'])
def test_detectors(kind):
    cfg = resized(detection(kind), dict(type='Resize', scale=(128, 160), keep_ratio=True))
    bench = MMBench(cfg, RANDOM)
    facts = bench.prepare()
    assert facts.image_size == (128, 160)
    shapes = [s.metainfo['img_shape'] for s in bench.batch['data_samples']]
    assert shapes == [(128, 160), (128, 120)]  # the batch is padded, as one of photographs is
    (row,) = benchmark(bench, [Variant('')], ['mmrazor-style'], 1, quiet())
    assert row.variant == 'NFD' and set(row.parts) == {'student', 'teacher', 'step', 'mmrazor-style'}
    parts = row.parts
    assert parts['step'].kept > parts['student'].kept > 0 and parts['teacher'].kept == 0
    assert parts['step'].peak > parts['student'].peak > parts['step'].kept / 4
    assert parts['step'].waits == parts['student'].waits  # distillation makes the host wait nowhere
    assert parts['mmrazor-style'].wait_count > parts['step'].wait_count


def test_masks_where_the_pipeline_loads_them():
    cfg = resized(detection('FasterRCNN'), dict(type='LoadAnnotations', with_mask=True))
    student = build_model(cfg.model.student, 'student')
    batch = made_up_batch(cfg, student, (96, 128), 2, False, Options(boxes=3))
    instances = [s.gt_instances for s in batch['data_samples']]
    assert [i.masks.masks.shape for i in instances] == [(3, 96, 128)] * 2
    assert all(m.sum() > 1 for i in instances for m in i.masks.masks)
    assert all(i.labels.max() < 6 for i in instances)
    batch = made_up_batch(detection('FasterRCNN'), student, (96, 128), 1, True, Options(boxes=3))
    assert 'masks' not in batch['data_samples'][0].gt_instances


def test_variants_share_the_models(segmentation):
    bench = MMBench(segmentation, RANDOM)
    variants = [Variant('one', {'a': {'type': 'CWD'}}), Variant('two', {'b': {'type': 'NFD', 'taps': 'backbone:2'}})]
    one, two = benchmark(bench, variants, iterations=1, quiet=quiet())
    assert (one.variant, two.variant, two.distillers) == ('one', 'two', variants[1].distillers)
    assert set(one.parts) == {'student', 'teacher', 'step'}


def test_teacher_of_a_file(segmentation, tmp_path):
    path = tiny.saved(tiny.segmentor(8), tmp_path / 'teacher.pth')
    segmentation.model.teacher.checkpoint = path
    bench = MMBench(segmentation, Options())
    assert not bench.prepare().random_teacher
    state = torch.load(path, weights_only=False)['state_dict']
    assert all(torch.equal(v, state[k]) for k, v in bench.toolbox.teacher.state_dict().items())


def test_mixed_precision_of_the_config(segmentation, monkeypatch):
    segmentation.optim_wrapper.type = 'AmpOptimWrapper'
    bench = MMBench(segmentation, RANDOM)
    assert bench.prepare().precision == 'mixed precision'
    precisions, context = [], Distillation.context

    def spy(self, *args):
        precisions.append(current_precision('cpu'))
        return context(self, *args)

    monkeypatch.setattr(Distillation, 'context', spy)
    with bench.variant({'mimic': {'type': 'FeatureMimic', 'taps': 'backbone:3'}}, []) as works:
        assert precisions == [torch.bfloat16]  # where it is found out what distillers ask of a RoI head
        seen = []
        bench.toolbox.teacher.backbone.layer1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        works['teacher']()
        works['step']()
        assert set(seen) == {torch.bfloat16}


# -- sizes -------------------------------------------------------------------------------------------------------------

RESIZE = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
CHOICE = dict(type='RandomChoiceResize', scales=[(480, 1333), (800, 1333), (640, 1333)])


@pytest.mark.parametrize(
    ('transforms', 'expected'),
    [
        ([RESIZE], ((800, 1333), True)),
        ([CHOICE], ((800, 1333), True)),
        ([RESIZE, dict(type='mmdet.RandomCrop', crop_size=(512, 384))], ((384, 512), False)),
        ([dict(type='RandomResize', scale=(1280, 1280)), dict(type='Pad', size=(640, 640))], ((640, 640), False)),
        ([dict(type='RandomResize', scale=(1280, 1280)), dict(type='Pad', size_divisor=32)], ((1280, 1280), True)),
        (
            [
                dict(
                    type='RandomChoice',
                    transforms=[
                        [CHOICE],
                        [dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600)), CHOICE],
                    ],
                )
            ],
            ((800, 1333), True),
        ),
    ],
)
def test_image_size_of_a_pipeline(transforms, expected):
    cfg = resized(detection(), *transforms)
    assert image_size(cfg, build_model(cfg.model.student, 'student')) == expected


def test_image_size_behind_a_wrapper():
    cfg = resized(detection(), RESIZE)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=inner)
    student = build_model(cfg.model.student, 'student')
    assert image_size(cfg, student) == ((800, 1333), True)
    cfg.train_dataloader.dataset = dict(
        type='MultiImageMixDataset', dataset=inner, pipeline=[dict(type='Pad', size=64)]
    )
    assert image_size(cfg, student) == ((64, 64), False)


def test_image_size_that_is_given_holds_for_a_fixed_one_too(segmentation):
    bench = MMBench(segmentation, Options((96, 128), 3, random_teacher=True))
    assert (bench.prepare().image_size, bench.batch['inputs'].shape) == ((96, 128), (3, 3, 96, 128))


# -- what can not be measured ------------------------------------------------------------------------------------------


def test_sentences(segmentation):
    with pytest.raises(ConfigError, match='There is no checkpoint file nowhere.pth.*or measure with --random-teacher'):
        MMBench(segmentation, Options()).prepare()
    with pytest.raises(ConfigError, match='does not say how large images are; give --image-size H W'):
        MMBench(detection(), RANDOM).prepare()
    bench = MMBench(segmentation, RANDOM)
    bench.prepare()
    asleep = {'mimic': {'type': 'FeatureMimic', 'taps': 'backbone:3', 'loss_weight': 0}}
    with pytest.raises(ConfigError, match='every loss_weight is 0'), bench.variant(asleep, []):
        pass
    segmentation.pop('train_dataloader')
    with pytest.raises(ConfigError, match='train_dataloader.batch_size: the config has none; give --batch N'):
        MMBench(segmentation, RANDOM).prepare()
    segmentation.pop('optim_wrapper')
    with pytest.raises(ConfigError, match='optim_wrapper: the config has none'):
        MMBench(segmentation, RANDOM).prepare()
    segmentation.model = segmentation.model.student
    with pytest.raises(ConfigError, match='has no model of type kd_dense.Distillation'):
        MMBench(segmentation, RANDOM)


def test_batch_of_one_where_a_norm_needs_two__one_sentence():
    student, teacher = (
        tiny.segmentor(width, type='PSPHead', in_channels=8 * width, in_index=3, pool_scales=(1, 2)) for width in (4, 8)
    )
    cfg = tiny.segmentation_run(distillation(student, teacher, cwd=dict(type='CWD')), Path('nowhere'))
    with pytest.raises(ConfigError, match='--batch: batch norm needs more than one image here; give --batch 2 or more'):
        benchmark(MMBench(cfg, Options(batch=1, random_teacher=True)), [Variant('')], [], 1, quiet())


def test_pretrained_weights_are_not_fetched():
    cfg = Config(
        dict(
            pretrained='torchvision://resnet18',
            backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://x')),
            heads=[dict(init_cfg=dict(type='Normal', std=0.01)), dict(init_cfg=[dict(type='Kaiming')])],
        )
    )
    found = _without_files(cfg._cfg_dict)
    assert found['pretrained'] is None and found['backbone']['init_cfg'] is None
    assert found['heads'][0]['init_cfg']['type'] == 'Normal' and found['heads'][1]['init_cfg'] == [{'type': 'Kaiming'}]
