"""RoIKD: on made-up RoI heads against NumPy in float64, and on Faster, Mask and Cascade R-CNN."""

import copy
import math

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from scipy.special import expit, log_softmax, softmax
from torch import nn

from kd_dense import ConfigError, Distillation, DistillationError
from kd_dense.context import Context
from kd_dense.description import Probe, RoIStage
from kd_dense.distillers import RoIKD
from kd_dense.models.build import build_model
from kd_dense.models.describe import describe
from kd_dense.models.rois import TeacherRoIs
from kd_dense.taps import Taps
from tests.helpers import tiny
from tests.helpers.dispatch import Operations

CLASSES = 3
CANVAS = (64, 96)


# -- made-up heads -----------------------------------------------------------------------------------------------------


class MadeUp:
    """Stands for the teacher's RoI head: gives what it was made with, and notes what it was asked."""

    def __init__(self, boxes, masks=()):
        self.outputs, self.mask_outputs, self.asked = boxes, masks, []

    def boxes(self, features, rois, stage):
        self.asked.append((stage, rois))
        return self.outputs[stage]

    def masks(self, features, rois, stage):
        return self.mask_outputs[stage]


def probe(*stages):
    return Probe({}, {}, CANVAS, '', rois=stages)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def regions(count, images=2):
    corner = torch.rand(count, 2, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(count, 2, dtype=torch.float64) * 30], 1)
    return torch.cat([torch.arange(count)[:, None] % images, boxes], 1)


def head(count, agnostic=False):
    """Class logits and deltas for ``count`` regions."""
    return normal(count, CLASSES + 1), normal(count, 4 if agnostic else 4 * CLASSES)


def objects(rois):
    """One object near every third region, of its image."""
    boxes, labels = [], []
    for i in range(2):
        own = rois[rois[:, 0] == i][::3, 1:]
        boxes.append(own + torch.rand_like(own))
        labels.append(torch.randint(0, CLASSES, (len(own),)))
    return boxes, labels


def call(method, student, teacher, context=None, **more):
    """Loss names -> numbers; ``student``: per stage regions, logits and deltas; ``teacher``: per stage the latter."""
    rois, logits, deltas = (list(x) for x in zip(*student, strict=True))
    context = context or Context(CANVAS)
    context.teacher_rois = teacher if isinstance(teacher, MadeUp) else MadeUp(teacher)
    taps = {'features': [], 'rois': rois, 'classes': logits, 'deltas': deltas, **more}
    return method(taps, {'features': [normal(1)]}, context)


def ready(method, student, teacher):
    method.setup(probe(*student), probe(*teacher))
    return method.double()


def numbers(losses):
    return {name: value.item() for name, value in losses.items()}


def kl_of(logits, their_logits, temperature=1.0, background_weight=1.5):
    total = 0.0
    for s, t in zip(logits.numpy(), their_logits.numpy(), strict=True):
        p = softmax(t / temperature)
        weight = 1 + (background_weight - 1) * softmax(t)[-1]
        total += weight * (p * (log_softmax(t / temperature) - log_softmax(s / temperature))).sum()
    return temperature**2 * total / len(logits)


def class_of(deltas, k, stage):
    return deltas if stage.class_agnostic else deltas[4 * k : 4 * k + 4]


def raw(deltas, stage):
    """Deltas in sizes of the region."""
    return deltas * np.array(stage.stds) + np.array(stage.means)


# -- numbers -----------------------------------------------------------------------------------------------------------

SAME = RoIStage(CLASSES)
FINE = RoIStage(CLASSES, means=(0.1, -0.1, 0.0, 0.2), stds=(0.1, 0.1, 0.2, 0.2), positive_iou=0.6)
AGNOSTIC = RoIStage(CLASSES, class_agnostic=True, stds=(0.05, 0.05, 0.1, 0.1))


@pytest.mark.parametrize('t', [SAME, FINE, AGNOSTIC], ids=['same', 'fine', 'agnostic'])
@pytest.mark.parametrize('s', [SAME, FINE, AGNOSTIC], ids=['same', 'fine', 'agnostic'])
def test_l1__in_the_students_units(s, t):
    rois, (logits, deltas), their = regions(9), head(9, s.class_agnostic), head(9, t.class_agnostic)
    losses = numbers(call(ready(RoIKD(temperature=2.0), [s], [t]), [(rois, logits, deltas)], [their]))
    total = 0.0
    for r in range(9):
        scores = softmax(their[0][r].numpy())[:-1]
        k = int(scores.argmax())
        theirs = (raw(class_of(their[1][r].numpy(), k, t), t) - np.array(s.means)) / np.array(s.stds)
        total += scores[k] * np.abs(class_of(deltas[r].numpy(), k, s) - theirs).sum()
    assert losses['loss_box'] == pytest.approx(total / 9, rel=1e-6)  # the numbers of the coders are fp32
    assert losses['loss_class'] == pytest.approx(kl_of(logits, their[0], 2.0), rel=1e-12)


def test_giou__of_boxes_decoded_by_each_sides_coder():
    rois, (logits, deltas), their = regions(9), head(9), head(9, True)
    method = ready(RoIKD(box_loss='giou', class_weight=0), [FINE], [AGNOSTIC])
    losses = numbers(call(method, [(rois, logits, deltas)], [their]))
    total = 0.0
    for r in range(9):
        scores = softmax(their[0][r].numpy())[:-1]
        k = int(scores.argmax())
        x1, y1, x2, y2 = rois[r, 1:].tolist()
        corners = []
        for d, stage in ((deltas[r].numpy(), FINE), (their[1][r].numpy(), AGNOSTIC)):
            dx, dy, dw, dh = raw(class_of(d, k, stage), stage)
            cx, cy = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            corners.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        total += scores[k] * (1 - giou(*corners))
    assert list(losses) == ['loss_box']
    assert losses['loss_box'] == pytest.approx(total / 9, rel=1e-6)


def giou(a, b):
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union - (hull - union) / hull


@pytest.mark.parametrize('margin', [0.0, 3.0])
def test_bounded__by_a_loop(margin):
    rois, (logits, deltas), their = regions(30), head(30), head(30, True)
    boxes, labels = objects(rois)
    method = ready(RoIKD(box_loss='bounded', margin=margin, box_weight=0.5), [FINE], [AGNOSTIC])
    context = Context(CANVAS, boxes=boxes, labels=labels)
    losses = numbers(call(method, [(rois, logits, deltas)], [their], context))
    total, positives, kept = 0.0, 0, 0
    for r in range(30):
        image, x1, y1, x2, y2 = rois[r].tolist()
        overlaps = [iou((x1, y1, x2, y2), box) for box in boxes[int(image)].tolist()]
        best = int(np.argmax(overlaps))
        if overlaps[best] < 0.6:
            continue
        positives += 1
        u1, v1, u2, v2 = boxes[int(image)][best].tolist()
        y = np.array([
            ((u1 + u2) - (x1 + x2)) / 2 / (x2 - x1),
            ((v1 + v2) - (y1 + y2)) / 2 / (y2 - y1),
            math.log((u2 - u1) / (x2 - x1)),
            math.log((v2 - v1) / (y2 - y1)),
        ])  # fmt: skip
        k = labels[int(image)][best].item()
        own, bound = (
            (((raw(d, stage) - y) / np.array(FINE.stds)) ** 2).sum()
            for d, stage in ((class_of(deltas[r].numpy(), k, FINE), FINE), (their[1][r].numpy(), AGNOSTIC))
        )
        if own + margin > bound:
            total, kept = total + own, kept + 1
    assert 0 < kept <= positives < 30
    assert losses['loss_box'] == pytest.approx(0.5 * total / 30, rel=1e-5)


def iou(a, b):
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - both)


@pytest.mark.parametrize('agnostic', [(False, False), (True, False), (False, True)])
def test_masks__of_the_class_of_the_object(agnostic):
    rois = regions(8)[::2]
    boxes, labels = [rois[rois[:, 0] == i, 1:] for i in range(2)], [torch.tensor([2, 0, 1, 2]), torch.zeros(0).long()]
    ours, theirs = (normal(4, 1 if a else CLASSES, 6, 6) for a in agnostic)
    stages = [RoIStage(CLASSES, mask_agnostic=a) for a in agnostic]
    method = ready(RoIKD(class_weight=0, box_weight=0, mask_weight=2.0), stages[:1], stages[1:])
    context = Context(CANVAS, boxes=boxes, labels=labels, teacher_rois=MadeUp([], [theirs]))
    losses = method({'features': [], 'mask_rois': [rois], 'masks': [ours]}, {'features': []}, context)
    total = 0.0
    for r, k in enumerate(labels[0].tolist()):
        p, q = (expit(x[r, 0 if a else k].numpy()) for x, a in zip((theirs, ours), agnostic[::-1], strict=True))
        total += (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    assert numbers(losses) == {'loss_mask': pytest.approx(2 * total / (4 * 36), rel=1e-10)}


def test_masks__of_a_teacher_of_another_resolution_are_resized():
    rois = regions(4)
    context = Context(CANVAS, boxes=[rois[::2, 1:], rois[1::2, 1:]], labels=[torch.zeros(2).long()] * 2)
    ours = normal(4, 1, 4, 4)
    stage = RoIStage(CLASSES, mask_agnostic=True)
    method = ready(RoIKD(class_weight=0, box_weight=0, mask_weight=1.0), [stage], [stage])
    # a teacher of twice the size, each pixel repeated, is the same teacher after bilinear resizing at pixel centres
    context.teacher_rois = MadeUp([], [ours.repeat_interleave(2, 2).repeat_interleave(2, 3)])
    losses = method({'features': [], 'mask_rois': [rois], 'masks': [ours]}, {'features': []}, context)
    assert losses['loss_mask'].item() == pytest.approx(0, abs=1e-6)


# -- stages ------------------------------------------------------------------------------------------------------------


def test_cascades__stage_by_stage_with_the_students_weights():
    stages = [RoIStage(CLASSES, True, stds=(0.1 / n,) * 4, weight=w) for n, w in ((1, 1.0), (2, 0.5), (3, 0.25))]
    student = [(regions(n), *head(n, True)) for n in (5, 6, 7)]
    teacher = MadeUp([head(n, True) for n in (5, 6, 7)])
    losses = numbers(call(ready(RoIKD(), stages, stages), student, teacher))
    assert [stage for stage, _ in teacher.asked] == [0, 1, 2]
    assert all(asked is own[0] for (_, asked), own in zip(teacher.asked, student, strict=True))
    single = [
        numbers(call(ready(RoIKD(), [RoIStage(CLASSES, True)], [RoIStage(CLASSES, True)]), [s], [t]))
        for s, t in zip(student, teacher.outputs, strict=True)
    ]
    for name, value in losses.items():
        expected = sum(w * one[name] for w, one in zip((1, 0.5, 0.25), single, strict=True))
        assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(('ours', 'theirs', 'stage'), [(1, 3, 2), (3, 1, 0), (2, 3, 2)])
def test_different_numbers_of_stages__the_last_of_both(ours, theirs, stage):
    student = [(regions(n + 4), *head(n + 4)) for n in range(ours)]
    teacher = MadeUp([None] * (theirs - 1) + [head(ours + 3)])
    losses = numbers(call(ready(RoIKD(), [SAME] * ours, [SAME] * theirs), student, teacher))
    assert [s for s, _ in teacher.asked] == [stage] and teacher.asked[0][1] is student[-1][0]
    assert losses['loss_class'] == pytest.approx(kl_of(student[-1][1], teacher.outputs[-1][0]), rel=1e-10)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('box_loss', ['l1', 'giou'])
def test_equal_heads__have_no_loss(box_loss):
    rois, own = regions(6), head(6)
    losses = numbers(call(ready(RoIKD(box_loss=box_loss), [FINE], [FINE]), [(rois, *own)], [own]))
    assert losses == {'loss_class': 0, 'loss_box': 0}


@pytest.mark.parametrize('box_loss', ['l1', 'giou', 'bounded'])
def test_no_region_and_no_object__are_differentiable_zeros(box_loss):
    stage = RoIStage(CLASSES, mask_agnostic=False)
    method = ready(RoIKD(box_loss=box_loss, mask_weight=1.0), [stage], [stage])
    own, masks = [x.requires_grad_() for x in head(0)], normal(0, CLASSES, 4, 4).requires_grad_()
    none = [torch.zeros(0, 4), torch.zeros(0, 4)], [torch.zeros(0).long()] * 2
    losses = call(
        method,
        [(regions(0), *own)],
        MadeUp([head(0)], [normal(0, CLASSES, 4, 4)]),
        Context(CANVAS, boxes=none[0], labels=none[1]),
        mask_rois=[regions(0)],
        masks=[masks],
    )
    sum(losses.values()).backward()
    assert numbers(losses) == {'loss_class': 0, 'loss_box': 0, 'loss_mask': 0}
    assert all(x.grad is not None for x in (*own, masks))


def test_gradients__go_to_the_student_only_and_nothing_is_to_train():
    rois, own, their = regions(6), head(6), head(6)
    method = ready(RoIKD(), [SAME], [FINE])
    for x in (*own, *their):
        x.requires_grad_()
    sum(call(method, [(rois, *own)], [their]).values()).backward()
    assert all(x.grad is None for x in their) and all(x.grad.abs().sum() > 0 for x in own)
    assert not list(method.parameters()) and not method.state_dict()


@pytest.mark.parametrize('box_loss', ['l1', 'giou', 'bounded'])
def test_a_step__waits_for_nothing_and_has_no_loop_over_regions_or_objects(box_loss):
    stage = RoIStage(CLASSES, mask_agnostic=False)
    method = ready(RoIKD(box_loss=box_loss, mask_weight=1.0), [stage], [FINE.__class__(CLASSES, mask_agnostic=True)])
    totals = []
    for count in (6, 30):
        rois, own = regions(count), [x.requires_grad_() for x in head(count)]
        masks, theirs = normal(count, CLASSES, 4, 4).requires_grad_(), normal(count, 1, 4, 4)
        boxes, labels = objects(rois)
        context, their = Context(CANVAS, boxes=boxes, labels=labels), MadeUp([head(count)], [theirs])
        with Operations() as operations:
            losses = call(method, [(rois, *own)], their, context, mask_rois=[rois], masks=[masks])
            sum(losses.values()).backward()
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision__is_reduced_in_fp32(dtype):
    rois, own, their = regions(6).float(), [x.to(dtype) for x in head(6)], [x.to(dtype) for x in head(6)]
    method = ready(RoIKD(), [FINE], [FINE]).float()
    losses = call(method, [(rois, *own)], [their])
    exact = call(method.double(), [(rois, *(x.double() for x in own))], [[x.double() for x in their]])
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=1e-4)


# -- the view of a RoI extractor ---------------------------------------------------------------------------------------


class Extractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.roi_layers, self.featmap_strides = nn.ModuleList([nn.Identity()]), [4]

    def forward(self, feats, rois, roi_scale_factor=None):
        return feats[0][: len(rois)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.extractor, self.other = Extractor(), nn.Identity()

    def forward(self, feats, *args, **kwargs):
        return self.other(self.extractor(feats, *args, **kwargs))


@pytest.mark.parametrize('compiled', [False, True])
def test_rois__are_what_the_extractor_is_called_with(compiled):
    model, rois, feats = Model(), regions(3), (normal(5, 2),)
    taps = Taps(model, ['extractor@rois', 'extractor'])
    run = torch.compile(model, backend='eager') if compiled else model
    for args, kwargs in (((rois,), {}), ((), dict(rois=rois)), ((rois, 1.5), {})):
        with taps.record():
            run(feats, *args, **kwargs)
            values = taps.take()
        assert torch.equal(values['extractor@rois'][0], rois) and values['extractor'][0].shape == (3, 2)


def test_rois__other_modules_have_none():
    with pytest.raises(ConfigError, match='other is a Identity without rois; .*extractor'):
        Taps(Model(), ['other@rois'])


# -- real detectors ----------------------------------------------------------------------------------------------------

PAIRS = {
    'faster': ('FasterRCNN', 'FasterRCNN', {}),
    'faster, giou': ('FasterRCNN', 'FasterRCNN', dict(box_loss='giou', temperature=2.0)),
    'faster, as the paper': ('FasterRCNN', 'FasterRCNN', dict(box_loss='bounded', box_weight=0.5, weight_terms=True)),
    'cascade': ('CascadeRCNN', 'CascadeRCNN', {}),
    'cascade, bounded': ('CascadeRCNN', 'CascadeRCNN', dict(box_loss='bounded', margin=0.1)),
    'cascade teaches faster': ('FasterRCNN', 'CascadeRCNN', {}),
    'faster teaches cascade': ('CascadeRCNN', 'FasterRCNN', {}),
    'mask': ('MaskRCNN', 'MaskRCNN', dict(mask_weight=1.0)),
    'mask alone': ('MaskRCNN', 'MaskRCNN', dict(class_weight=0, box_weight=0, mask_weight=1.0)),
    'mask teaches faster': ('FasterRCNN', 'MaskRCNN', {}),
    'cascade mask teaches mask': ('MaskRCNN', 'CascadeMaskRCNN', dict(mask_weight=1.0)),
    'cascade mask': ('CascadeMaskRCNN', 'CascadeMaskRCNN', dict(mask_weight=1.0)),
}


def distillation(student='FasterRCNN', teacher='FasterRCNN', options=None, scale=1.0, **distillers):
    torch.manual_seed(1)
    built = build_model(tiny.detector(teacher, 8), 'teacher')
    built.init_weights()
    student = tiny.detector(student, 4) if isinstance(student, str) else student
    roi = dict(roi=dict(type='RoIKD', **(options or {})))
    model = Distillation(student, dict(config=built, scale=scale), roi | distillers).train()
    model.progress = 0.0
    return model


def batch(masks=False, boxes=3):
    """Images of two sizes, and one without an object."""
    data = tiny.detection_batch(((64, 64), (48, 64), (64, 40)), masks=masks, boxes=boxes)
    data['data_samples'][2].gt_instances = data['data_samples'][2].gt_instances[:0]
    return data


def losses_of(model, data):
    return model(**model.data_preprocessor(data, True), mode='loss')


@pytest.mark.parametrize('name', PAIRS)
def test_detectors__take_a_step(name):
    student, teacher, options = PAIRS[name]
    model = distillation(student, teacher, options)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    logs = model.train_step(batch('Mask' in student), wrapper)
    model.distillers.verify_gradients()
    terms = {'loss_class', 'loss_box'} if options.get('class_weight', 1) else set()
    terms |= {'loss_mask'} if 'mask_weight' in options else set()
    assert {k.removeprefix('kd.roi.') for k in logs if k.startswith('kd.')} == terms
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in logs.values())
    plain = build_model(tiny.detector(student, 4), 'student')
    plain.load_state_dict(model.state_dict(), strict=True)


def test_weight__can_be_calibrated_next_to_other_distillers():
    mimic = dict(type='FeatureMimic', taps='neck')
    model = distillation(options=dict(loss_weight=dict(type='auto', share=0.5)), mimic=mimic)
    losses = losses_of(model, batch())
    assert losses['kd.roi.loss_class'] > 0 and losses['kd.roi.loss_box'] > 0 and losses['kd.mimic.loss'] > 0


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


def test_heads__run_once_and_the_teachers_rpn_never():
    model = distillation('MaskRCNN', 'MaskRCNN', dict(mask_weight=1.0))
    teacher, student = model.teacher.model, model.student
    names = ['neck', 'roi_head.bbox_roi_extractor', 'roi_head.bbox_head', 'roi_head.mask_head']
    sides = [[count_calls(side.get_submodule(name)) for name in names] for side in (teacher, student)]
    rpn = count_calls(teacher.rpn_head.rpn_conv)
    for step in (1, 2):
        losses_of(model, batch(masks=True))
        assert [[len(calls) for calls in side] for side in sides] == [[step] * 4, [step] * 4]
    assert not rpn
    (_, asked), (_, sampled) = sides[0][1][-1], sides[1][1][-1]
    assert torch.equal(asked, sampled) and len(asked) > 10 and asked[:, 0].unique().tolist() == [0, 1, 2]


def test_scale__moves_the_regions_to_the_teachers_image():
    model = distillation(scale=1.5)
    asked, sampled = (count_calls(m.roi_head.bbox_roi_extractor) for m in (model.teacher.model, model.student))
    losses_of(model, batch())
    (maps, theirs), (_, ours) = asked[0], sampled[0]
    assert maps[0].shape[2:] == (24, 24)  # of 96 pixels, at stride 4
    torch.testing.assert_close(theirs, ours * torch.tensor([1, 1.5, 1.5, 1.5, 1.5]))


@pytest.mark.parametrize('kind', ['FasterRCNN', 'CascadeMaskRCNN'])
@pytest.mark.parametrize('box_loss', ['l1', 'giou'])
def test_equal_models__have_no_loss(kind, box_loss):
    config = tiny.detector(kind, 4)
    config['backbone']['norm_eval'] = True  # the teacher's is
    masks = 'Mask' in kind
    student = build_model(config, 'student')
    student.init_weights()
    options = dict(type='RoIKD', box_loss=box_loss, mask_weight=float(masks))
    model = Distillation(student, copy.deepcopy(student), {'roi': options}).train()
    model.progress = 0.0
    model.distillers._proved.add('roi')  # which would not let a loss of 0 pass
    losses = {k: v.item() for k, v in losses_of(model, batch(masks)).items() if k.startswith('kd.')}
    assert len(losses) == 2 + masks and losses == {k: pytest.approx(0, abs=1e-6) for k in losses}
    model.teacher.model.roi_head.float()
    with torch.no_grad():
        for p in model.teacher.model.roi_head.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert all(v > 1e-4 for k, v in losses_of(model, batch(masks)).items() if k.startswith('kd.'))


def test_loss__is_that_of_the_teachers_own_roi_head():
    model = distillation(options=dict(temperature=2.0))
    sampled = count_calls(model.student.roi_head.bbox_roi_extractor)
    outputs = []
    model.student.roi_head.bbox_head.register_forward_hook(lambda *args: outputs.append(args[2]))
    data = model.data_preprocessor(batch(), True)
    losses = model(**data, mode='loss')
    with torch.no_grad():
        teacher = model.teacher.model
        their = teacher.roi_head._bbox_forward(teacher.extract_feat(data['inputs']), sampled[0][1])
    expected = kl_of(outputs[0][0].detach().double(), their['cls_score'].double(), 2.0)
    assert losses['kd.roi.loss_class'].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('options', [dict(box_loss='bounded', mask_weight=1.0), dict(mask_weight=1.0)])
def test_a_first_batch_without_objects__proves_nothing(options):
    model = distillation('MaskRCNN', 'MaskRCNN', options)
    losses = losses_of(model, tiny.detection_batch(boxes=0, masks=True))
    assert all(v == 0 for k, v in losses.items() if k.startswith('kd.'))
    sum(v for k, v in losses.items() if k.startswith('kd.')).backward()
    losses = losses_of(model, batch(masks=True))
    assert all(v > 0 for k, v in losses.items() if k.startswith('kd.'))
    # later on such a batch has classes to compare, and no masks
    losses = losses_of(model, tiny.detection_batch(boxes=0, masks=True))
    assert losses['kd.roi.loss_class'] > 0 and losses['kd.roi.loss_mask'] == 0


def test_copies__have_no_teacher_in_them():
    model = distillation()
    losses_of(model, batch())
    copied = copy.deepcopy(model.distillers)
    assert not any(isinstance(v, (nn.Module, TeacherRoIs)) for v in vars(copied.methods['roi']).values())


# -- the adapter -------------------------------------------------------------------------------------------------------


def test_description__reads_coders_thresholds_and_weights_of_every_stage():
    stages = describe(build_model(tiny.detector('CascadeMaskRCNN', 4), 'model')).rois
    assert [s.stds for s in stages] == [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
    assert [s.positive_iou for s in stages] == [0.5, 0.6, 0.7] and [s.weight for s in stages] == [1, 0.5, 0.25]
    assert all(s.class_agnostic and s.mask_agnostic is False and s.num_classes == 6 for s in stages)
    config = tiny.detector('FasterRCNN', 4)
    config['train_cfg'] = None  # a teacher needs none
    (stage,) = describe(build_model(config, 'model')).rois
    assert stage == RoIStage(6)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(box_loss='iou'), r"box_loss must be one of .*'giou'.*, not 'iou'"),
        (dict(temperature=0), 'temperature must be a finite number > 0'),
        (dict(mask_weight=-1), 'mask_weight must be a finite number >= 0, not -1'),
        (dict(margin=float('nan')), 'margin must be a finite number >= 0'),
        (dict(class_weight=0, box_weight=0), 'are all 0; leave at least one term'),
    ],
)
def test_options__that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        RoIKD(**options)


def changed(kind='FasterRCNN', **bbox_head):
    config = tiny.detector(kind, 4)
    config['roi_head']['bbox_head'].update(bbox_head)
    return config


@pytest.mark.parametrize(
    ('student', 'teacher', 'options', 'message'),
    [
        (
            'RetinaNet',
            'FasterRCNN',
            {},
            r"distillers\.roi: the student has no tap 'rois': it has no RoI head.* LogitKD",
        ),
        ('FasterRCNN', 'RetinaNet', {}, "the teacher has no tap 'roi_features': it has no RoI head"),
        (
            'FasterRCNN',
            'FasterRCNN',
            dict(mask_weight=1.0),
            "no tap 'mask_rois': FasterRCNN has no mask head; leave mas",
        ),
        (
            'MaskRCNN',
            'FasterRCNN',
            dict(mask_weight=1.0),
            'mask_weight=1 needs mask heads .* the teacher predicts no ma',
        ),
        (changed(num_classes=5), 'FasterRCNN', {}, 'RoIKD needs equal classes: the student has 5, the teacher 6'),
        (
            changed(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True)),
            'FasterRCNN',
            {},
            'classes of Shared2FCBBoxHead with CrossEntropyLoss are no softmax with a background class; distil feat',
        ),
        (
            changed(bbox_coder=dict(type='TBLRBBoxCoder')),
            'FasterRCNN',
            {},
            'boxes of Shared2FCBBoxHead are encoded by TBLRBBoxCoder',
        ),
    ],
)
def test_detectors__that_can_not_be_compared(student, teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        distillation(student, teacher, options)


def test_setup__says_which_side_can_not_be_read():
    with pytest.raises(ConfigError, match='can not read the RoI head of the teacher: it has no RoI head'):
        RoIKD().setup(probe(SAME), Probe({}, {}, CANVAS, ''))


def test_masks__that_are_made_of_the_features_of_boxes():
    config = tiny.detector('MaskRCNN', 4)
    config['roi_head']['mask_roi_extractor'] = None
    with pytest.raises(ConfigError, match="no tap 'mask_rois': MaskRCNN takes the features of its boxes"):
        distillation(config, 'MaskRCNN', dict(mask_weight=1.0))


def test_students__that_get_their_proposals_with_their_images():
    config = tiny.detector('FasterRCNN', 4)
    config['type'] = 'FastRCNN'
    for part in (config, config['train_cfg'], config['test_cfg']):
        for key in ('rpn_head', 'rpn', 'rpn_proposal'):
            part.pop(key, None)
    with pytest.raises(ConfigError, match="no tap 'rois': FastRCNN gets its proposals with its images"):
        distillation(config)
    # as a teacher it is asked about the student's
    torch.manual_seed(1)
    model = Distillation(
        tiny.detector('FasterRCNN', 4), build_model(config, 'teacher'), {'roi': dict(type='RoIKD')}
    ).train()
    model.progress = 0.0
    assert losses_of(model, batch())['kd.roi.loss_box'] > 0


def test_samplers__that_run_the_head_themselves():
    config = tiny.detector('FasterRCNN', 4)
    config['train_cfg']['rcnn']['sampler'] = dict(
        type='OHEMSampler', num=4, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True
    )
    model = distillation(config)
    with pytest.raises(DistillationError, match='times in this forward, not once for each of its 1 stages; choose a s'):
        losses_of(model, batch())


def test_a_trainer_without_the_teachers_head():
    method = ready(RoIKD(), [SAME], [SAME])
    taps = {'rois': [regions(2)], 'classes': [head(2)[0]], 'deltas': [head(2)[1]]}
    with pytest.raises(DistillationError, match='no RoI head of the teacher'):
        method(taps, {'features': []}, Context(CANVAS))
