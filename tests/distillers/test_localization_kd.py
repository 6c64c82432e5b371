"""Localisation distillation: its regions, forms and weights against loops in float64, and on real detectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from scipy.special import expit, rel_entr, softmax

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.description import Boxes, Logits, Probe
from kd_dense.distillers import LocalizationKD
from kd_dense.errors import ConfigError
from kd_dense.geometry.dense_boxes import anchors_of, grid_anchors
from kd_dense.geometry.localization_regions import localization_regions
from kd_dense.models.build import build_model
from tests.generality import shrink
from tests.helpers import tiny
from tests.helpers.dispatch import Operations

CANVAS = (32, 48)
STRIDES = (4.0, 8.0, 16.0)
SIZES = [(8, 12), (4, 6), (2, 3)]
CLASSES = 3
BINS = 6
SIGMOID = Logits(CLASSES, 'sigmoid')
DISTRIBUTION = Boxes('distribution', STRIDES, bins=BINS)
DISTANCE = Boxes('distance', STRIDES)
#: Two anchors for each cell, of both shapes.
ANCHORS = tuple(((-s, -2 * s, s, 2 * s), (-2 * s, -s, 2 * s, s)) for s in STRIDES)
DELTA = Boxes('delta', STRIDES, anchors=ANCHORS, stds=(0.1, 0.1, 0.2, 0.2))
OBJECTS = [[[3.0, 5.0, 21.0, 25.0], [20.0, 2.0, 45.0, 30.0]], [[2.0, 2.0, 13.0, 15.0]]]


def probes(boxes, sizes=SIZES, logits=SIGMOID, canvas=CANVAS):
    numbers, anchors = (4 * boxes.bins if boxes.kind == 'distribution' else 4), max(1, len((boxes.anchors or [()])[0]))
    shapes = {
        'boxes': [torch.Size((1, anchors * numbers, *size)) for size in sizes],
        'scores': [torch.Size((1, anchors * CLASSES, *size)) for size in sizes],
    }
    return Probe(shapes, {'boxes': ('boxes',), 'scores': ('logits',)}, canvas, logits, boxes=boxes)


def ready(student=DISTRIBUTION, teacher=None, **options):
    method = LocalizationKD(**options)
    method.setup(probes(student), probes(teacher or student))
    return method.double()


def tensors(boxes, scale=1.0):
    found = probes(boxes)
    return {
        role: [scale * torch.randn(2, *shape[1:], dtype=torch.float64) for shape in shapes]
        for role, shapes in found.shapes.items()
    }


def objects(boxes=OBJECTS, **context):
    return Context(CANVAS, boxes=[torch.tensor(b, dtype=torch.float64).reshape(-1, 4) for b in boxes], **context)


def regions(context, boxes=DISTRIBUTION, valid=None):
    """Both regions of every image, and the level, cell and anchor of every entry."""
    levels = [
        grid_anchors(anchors_of(boxes, i, 8.0).double(), stride, size)
        for i, (stride, size) in enumerate(zip(STRIDES, SIZES, strict=True))
    ]
    places = [
        (level, divmod(cell, SIZES[level][1]), anchor)
        for level, anchors in enumerate(levels)
        for cell in range(len(anchors))
        for anchor in range(anchors.shape[1])
    ]
    images = [localization_regions(levels, b, None if valid is None else valid[i]) for i, b in enumerate(context.boxes)]
    return images, places


def kl_at(s, t, temperature):
    """Of one anchor: ``[4 * bins]`` of both sides."""
    p, q = (softmax(x.reshape(4, BINS) / temperature, axis=1) for x in (t, s))
    return temperature**2 * rel_entr(p, q).sum() / 4


def by_loops(student, teacher, context, distance, scores=None, boxes=DISTRIBUTION, numbers=4 * BINS, valid=None):
    """``sum w d``, ``sum w`` of the main and of the valuable region."""
    images, places = regions(context, boxes, valid)
    sums = np.zeros((2, 2))
    for image, parts in enumerate(images):
        for n, (level, (row, column), anchor) in enumerate(places):
            weights = [float(parts[0][n]), float(parts[1][n])]
            if scores is not None:
                z = scores[level][image, anchor * CLASSES : (anchor + 1) * CLASSES, row, column]
                weights[0] *= expit(z.detach().numpy().max())
            if max(weights) == 0:
                continue
            s, t = (
                x['boxes'][level][image, anchor * numbers : (anchor + 1) * numbers, row, column].detach().numpy()
                for x in (student, teacher)
            )
            for k, weight in enumerate(weights):
                sums[k] += weight * distance(s, t), weight
    return sums


def loss(method, student, teacher, context):
    values = method(student, teacher, context)
    assert list(values) == ['loss'] and values['loss'].shape == ()
    return values['loss']


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scores', ['student', 'teacher', 'none'])
def test_distributions_in_both_regions(scores):
    student, teacher, context = tensors(DISTRIBUTION), tensors(DISTRIBUTION), objects()
    method = ready(scores=scores, temperature=4.0, main=0.7, valuable=0.3)
    source = {'student': student['scores'], 'teacher': teacher['scores'], 'none': None}[scores]
    main, valuable = by_loops(student, teacher, context, lambda s, t: kl_at(s, t, 4.0), source)
    assert main[1] > 0 and valuable[1] > 0
    expected = 0.7 * main[0] / main[1] + 0.3 * valuable[0] / valuable[1]
    assert loss(method, student, teacher, context).item() == pytest.approx(expected, rel=1e-9)


def test_sum_is_the_sum_of_the_authors_code():
    """Means over bins, sums over the sides divided by 4 in the main and by 16 in the valuable region; 0.25 each."""
    student, teacher, context = tensors(DISTRIBUTION), tensors(DISTRIBUTION), objects()

    def mean_over_bins(s, t):
        p, q = (softmax(x.reshape(4, BINS) / 10, axis=1) for x in (t, s))
        return 100 * rel_entr(p, q).mean(1).sum()

    main, valuable = by_loops(student, teacher, context, mean_over_bins, student['scores'])
    expected = 0.25 * (main[0] / 4 + valuable[0] / 16)
    value = 0.25 * loss(ready(reduction='sum'), student, teacher, context)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_main_region_and_sum_are_those_of_mmdets_own_head():
    """``LDHead`` of MMDetection, which has the main region only, on the same predictions; 0.25 is its loss weight."""
    from mmdet.models.dense_heads import LDHead
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope('mmdet')
    strides, sizes = [8, 16, 32], [(12, 16), (6, 8), (3, 4)]
    head = LDHead(
        CLASSES,
        8,
        loss_ld=dict(type='mmdet.KnowledgeDistillationKLDivLoss', loss_weight=0.25, T=10),
        loss_cls=dict(type='mmdet.QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type='mmdet.DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='mmdet.GIoULoss', loss_weight=2.0),
        bbox_coder=dict(type='mmdet.DistancePointBBoxCoder'),
        anchor_generator=dict(
            type='mmdet.AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=strides
        ),
        norm_cfg=dict(type='BN'),
        reg_max=BINS - 1,
        train_cfg=ConfigDict(
            assigner=dict(type='mmdet.ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False
        ),
    )
    student, teacher = ([2 * torch.randn(2, 4 * BINS, *size) for size in sizes] for _ in range(2))
    scores = [2 * torch.randn(2, CLASSES, *size) for size in sizes]
    objects = [
        torch.tensor([[3.0, 5.0, 61.0, 55.0], [40.0, 30.0, 120.0, 90.0]]),
        torch.tensor([[20.0, 9.0, 99.0, 88.0]]),
    ]
    theirs = head.loss_by_feat(
        scores,
        student,
        [InstanceData(bboxes=b, labels=torch.zeros(len(b), dtype=torch.long)) for b in objects],
        [dict(img_shape=(96, 128), pad_shape=(96, 128))] * 2,
        teacher,
    )['loss_ld']
    anchors = tuple(tuple(map(tuple, level.tolist())) for level in head.prior_generator.base_anchors)
    boxes = Boxes('distribution', tuple(map(float, strides)), bins=BINS, anchors=anchors)
    method = LocalizationKD(reduction='sum', valuable=0.0)
    method.setup(*[probes(boxes, sizes, canvas=(96, 128))] * 2)
    ours = loss(method, {'boxes': student, 'scores': scores}, {'boxes': teacher}, Context((96, 128), boxes=objects))
    assert ours > 0
    torch.testing.assert_close(0.25 * ours, sum(theirs), rtol=1e-4, atol=0)


def test_padding_is_left_out():
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    context = objects(image_sizes=torch.tensor([[32, 48], [16, 20]]))
    valid = [[], []]
    for image, (height, width) in enumerate(((32, 48), (16, 20))):
        for h, w in SIZES:
            valid[image] += [(r + 0.5) * 32 / h < height and (c + 0.5) * 48 / w < width for r, c in np.ndindex(h, w)]
    valid = torch.tensor(valid)
    main, valuable = by_loops(student, teacher, context, lambda s, t: kl_at(s, t, 10.0), student['scores'], valid=valid)
    expected = main[0] / main[1] + valuable[0] / valuable[1]
    assert loss(ready(), student, teacher, context).item() == pytest.approx(expected, rel=1e-9)
    unmasked = loss(ready(use_mask=False), student, teacher, context).item()
    assert abs(unmasked / expected - 1) > 1e-4
    # what is not finite in the padding is in neither value nor gradient
    outside = ~context.mask(SIZES[0]).expand_as(student['boxes'][0])
    student['boxes'][0] = student['boxes'][0].masked_fill(outside, float('inf')).requires_grad_()
    teacher['boxes'][0] = teacher['boxes'][0].masked_fill(outside, float('nan'))
    value = loss(ready(), student, teacher, context)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert student['boxes'][0].grad.isfinite().all() and (student['boxes'][0].grad != 0).any()


def corners_of(kind, values, anchor, offset=0.5):
    """Corners in strides from the cell, in NumPy; ``anchor`` in strides."""
    if kind == 'distance':
        left, top, right, bottom = values
        return np.array([offset - left, offset - top, offset + right, offset + bottom])
    dx, dy, dw, dh = values * np.array(DELTA.stds)
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (anchor[0] + anchor[2]) / 2 + dx * w, (anchor[1] + anchor[3]) / 2 + dy * h
    w, h = w * np.exp(dw), h * np.exp(dh)
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def giou_distance_of(a, b):
    inter = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    area = [np.prod(np.clip(x[2:] - x[:2], 0, None)) for x in (a, b)]
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    union = sum(area) - inter
    return 1 - inter / union + (hull - union) / hull


def test_iou_form_on_distances():
    student, teacher, context = tensors(DISTANCE), tensors(DISTANCE), objects()
    for side in (student, teacher):
        side['boxes'] = [x.exp() for x in side['boxes']]

    def distance(s, t):
        return giou_distance_of(corners_of('distance', s, None), corners_of('distance', t, None))

    main, valuable = by_loops(student, teacher, context, distance, student['scores'], DISTANCE, 4)
    expected = main[0] / main[1] + valuable[0] / valuable[1]
    assert loss(ready(DISTANCE), student, teacher, context).item() == pytest.approx(expected, rel=1e-9)
    # pixels of the teacher are strides times as many
    pixels = [x * stride for x, stride in zip(teacher['boxes'], STRIDES, strict=True)]
    method = ready(DISTANCE, replace(DISTANCE, unit='pixel'))
    value = loss(method, student, teacher | {'boxes': pixels}, context).item()
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('form', ['auto', 'l1'])
def test_deltas_of_two_anchors(form):
    student, teacher, context = tensors(DELTA), tensors(DELTA), objects()
    if form == 'l1':
        main, valuable = by_loops(
            student, teacher, context, lambda s, t: np.abs(s - t).mean(), student['scores'], DELTA, 4
        )
        expected = main[0] / main[1] + valuable[0] / valuable[1]
    else:  # the distance needs the anchor, so by hand
        images, places = regions(context, DELTA)
        sums = np.zeros((2, 2))
        for image, parts in enumerate(images):
            for n, (level, (row, column), anchor) in enumerate(places):
                shape = np.array(ANCHORS[level][anchor]) / STRIDES[level]
                s, t = (x['boxes'][level][image, 4 * anchor : 4 * anchor + 4, row, column].numpy()
                        for x in (student, teacher))  # fmt: skip
                d = giou_distance_of(corners_of('delta', s, shape), corners_of('delta', t, shape))
                z = student['scores'][level][image, anchor * CLASSES : (anchor + 1) * CLASSES, row, column]
                weights = float(parts[0][n]) * expit(z.numpy().max()), float(parts[1][n])
                sums += [[w * d, w] for w in weights]
        expected = (sums[:, 0] / sums[:, 1]).sum()
    assert loss(ready(DELTA, form=form), student, teacher, context).item() == pytest.approx(expected, rel=1e-6)


def test_l1_of_different_codes_compares_corners_in_strides():
    """A distribution and distances that say the same differ by nothing; one stride more on a side by 1/4."""
    student, teacher, context = tensors(DISTRIBUTION), tensors(DISTANCE), objects()
    bins = np.arange(BINS)
    teacher['boxes'] = [
        torch.tensor(np.einsum('bskhw,k->bshw', softmax(x.unflatten(1, (4, BINS)).numpy(), axis=2), bins))
        for x in student['boxes']
    ]
    method = ready(DISTRIBUTION, DISTANCE, form='l1', scores='none', valuable=0.0)
    assert loss(method, student, teacher, context).item() == pytest.approx(0, abs=1e-12)
    for x in teacher['boxes']:
        x[:, 2] += 1
    assert loss(method, student, teacher, context).item() == pytest.approx(0.25, rel=1e-9)


def test_everywhere_weighted_by_the_teacher():
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    total = weight = 0.0
    for s, t, z in zip(student['boxes'], teacher['boxes'], teacher['scores'], strict=True):
        for image, row, column in np.ndindex(2, *s.shape[2:]):
            w = expit(z[image, :, row, column].numpy().max())
            total += w * kl_at(s[image, :, row, column].numpy(), t[image, :, row, column].numpy(), 10.0)
            weight += w
    method = ready(region='all', scores='teacher')
    assert not method.needs_boxes
    value = loss(method, student, teacher, Context(CANVAS)).item()
    assert value == pytest.approx(total / weight, rel=1e-9)


def test_softmax_scores_leave_the_background_out():
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    method = LocalizationKD(region='all')
    method.setup(*[probes(DISTRIBUTION, logits=Logits(CLASSES, 'softmax'))] * 2)
    for z in student['scores']:
        z[:, :-1], z[:, -1] = 0.0, 50.0  # background, but for one cell
        z[0, 1, 1, 1] = 200.0
    value = loss(method.double(), student, teacher, Context(CANVAS)).item()
    cells = [kl_at(s[0, :, 1, 1].numpy(), t[0, :, 1, 1].numpy(), 10.0)
             for s, t in zip(student['boxes'], teacher['boxes'], strict=True)]  # fmt: skip
    assert value == pytest.approx(np.mean(cells), rel=1e-9)


# -- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('boxes', [DISTRIBUTION, DISTANCE, DELTA])
def test_equal_boxes_give_zero(boxes):
    student, context = tensors(boxes), objects()
    if boxes is DISTANCE:
        student['boxes'] = [x.exp() for x in student['boxes']]
    teacher = {role: [x.clone() for x in values] for role, values in student.items()}
    assert loss(ready(boxes), student, teacher, context).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('boxes', [DISTRIBUTION, DISTANCE, DELTA])
@pytest.mark.parametrize('form', ['auto', 'l1'])
def test_gradients_are_right_and_only_the_students_boxes_get_them(boxes, form):
    student, teacher, context = tensors(boxes), tensors(boxes), objects()
    method = ready(boxes, form=form)
    leaves = [x.requires_grad_() for x in student['boxes'][1:]]  # the coarse levels, to be quick

    def of(*levels):
        return loss(method, student | {'boxes': [student['boxes'][0], *levels]}, teacher, context)

    assert torch.autograd.gradcheck(of, leaves, fast_mode=True)
    others = [*student['scores'], *teacher['boxes'], *teacher['scores']]
    for x in others:
        x.requires_grad_()
    loss(method, student, teacher, context).backward()
    assert all(x.grad is None for x in others)
    assert any((x.grad != 0).any() for x in leaves)
    assert list(method.parameters()) == [] and method.state_dict() == {}


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('form', ['auto', 'iou', 'l1'])
def test_without_any_box_the_loss_is_zero_and_differentiable(form, reduction):
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    for x in student['boxes']:
        x.requires_grad_()
    value = loss(ready(form=form, reduction=reduction), student, teacher, objects([[], []]))
    value.backward()
    assert value.item() == 0
    assert all((x.grad == 0).all() for x in student['boxes'])
    assert LocalizationKD().needs_boxes


def test_an_image_without_boxes_changes_nothing_of_the_mean():
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    both = loss(ready(), student, teacher, objects([OBJECTS[0], []]))
    first = {role: [x[:1] for x in values] for role, values in student.items()}
    alone = loss(ready(), first, {r: [x[:1] for x in v] for r, v in teacher.items()}, objects([OBJECTS[0]]))
    torch.testing.assert_close(both, alone)


def test_half_precision():
    student, teacher = tensors(DISTRIBUTION), tensors(DISTRIBUTION)
    method = LocalizationKD()
    method.setup(*[probes(DISTRIBUTION)] * 2)
    halves = [{r: [x.bfloat16() for x in v] for r, v in side.items()} for side in (student, teacher)]
    context = objects()
    value = loss(method, *halves, context)
    assert value.dtype == torch.float32
    exact = loss(method.double(), *({r: [x.double() for x in v] for r, v in side.items()} for side in halves), context)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


def test_nothing_waits_for_the_device_and_boxes_are_not_looped_over():
    totals = []
    for count in (1, 25):
        student, teacher, method = tensors(DISTRIBUTION), tensors(DISTRIBUTION), ready()
        student['boxes'] = [x.requires_grad_() for x in student['boxes']]
        context = objects([OBJECTS[0][:1] * count, OBJECTS[1] * count], image_sizes=torch.tensor([[32, 48], [20, 24]]))
        with Operations() as operations:
            loss(method, student, teacher, context).backward()
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]


def test_a_choice_of_levels_keeps_their_strides():
    method = LocalizationKD(scores='none')
    method.setup(*[probes(DISTRIBUTION, SIZES[1:])] * 2)
    assert method.levels == {'student': [1, 2], 'teacher': [1, 2]}
    # the teacher has more of them, which distillation.py has brought into the student's order
    method.setup(probes(replace(DISTRIBUTION, strides=(8.0, 16.0)), SIZES[1:]), probes(DISTRIBUTION, SIZES[1:]))
    assert method.levels == {'student': [0, 1], 'teacher': [1, 2]}


# -- what can not be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'student, teacher, options, sentence',
    [
        ('it predicts no boxes', DISTANCE, {}, 'boxes of the student: it predicts no boxes'),
        (DISTANCE, 'it predicts no boxes', {}, 'boxes of the teacher: it predicts no boxes'),
        (DISTRIBUTION, replace(DISTRIBUTION, bins=8), {}, "student has 6 and the teacher 8; .*reg_max, or form='iou'"),
        (DISTANCE, DISTRIBUTION, dict(form='distribution'), "the student's does not; choose form='iou'"),
        (DISTRIBUTION, DELTA, {}, 'the student has 1 and the teacher 2 per cell at stride 4'),
        (
            DELTA,
            replace(DELTA, anchors=tuple(level[::-1] for level in ANCHORS)),
            {},
            'has 2 and the teacher 2 per cell .*or they differ in shape',
        ),
        (DISTANCE, replace(DISTANCE, strides=(4.0, 10.0, 16.0)), {}, 'at the strides 4, 10, 16, and not at 8 as'),
    ],
)
def test_boxes_that_can_not_be_compared(student, teacher, options, sentence):
    sides = [replace(probes(DISTANCE), boxes=b) if isinstance(b, str) else probes(b) for b in (student, teacher)]
    with pytest.raises(ConfigError, match=sentence):
        LocalizationKD(**options).setup(*sides)


def test_unequal_bins_can_be_compared_as_boxes():
    other = replace(DISTRIBUTION, bins=8)
    student, teacher = tensors(DISTRIBUTION), tensors(other)
    assert loss(ready(DISTRIBUTION, other, form='iou'), student, teacher, objects()).item() > 0


def test_other_cells_other_channels_and_other_scores():
    with pytest.raises(ConfigError, match=r'cell by cell, .*stride 4.*have other cells; leave teacher.scale at 1'):
        LocalizationKD().setup(probes(DISTANCE), probes(DISTANCE, [(h * 2, w * 2) for h, w in SIZES], canvas=(64, 96)))
    with pytest.raises(ConfigError, match="4 channels of the student are not the 24 numbers .*tap 'boxes'"):
        LocalizationKD().setup(replace(probes(DISTANCE), boxes=DISTRIBUTION), probes(DISTRIBUTION))
    with pytest.raises(ConfigError, match="class scores of the student: no logits; give scores='none'"):
        LocalizationKD().setup(probes(DISTANCE, logits='no logits'), probes(DISTANCE))
    with pytest.raises(ConfigError, match='score_taps: .* its 3 levels of boxes with 5 classes'):
        LocalizationKD().setup(probes(DISTANCE, logits=Logits(5, 'sigmoid')), probes(DISTANCE))
    with pytest.raises(ConfigError, match="needs ground-truth boxes.*region='all'"):
        loss(ready(DISTANCE), tensors(DISTANCE), tensors(DISTANCE), Context(CANVAS))


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(form='kl'), "form must be one of .*'distribution'.*not 'kl'"),
        (dict(region='main'), 'region must be one of'),
        (dict(scores='both'), 'scores must be one of'),
        (dict(reduction='none'), 'reduction must be one of'),
        (dict(main=-1.0), 'must be >= 0 and not both 0'),
        (dict(main=0.0, valuable=0.0), 'not both 0'),
        (dict(main=0.0, region='all'), 'not both 0'),
        (dict(temperature=0), 'temperature must be a finite number > 0'),
        (dict(nearest=0), 'nearest must be a whole number'),
        (dict(valuable_share=2), 'valuable_share in 0..1'),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LocalizationKD(**options)


# -- on real detectors -------------------------------------------------------------------------------------------------


def join(student, teacher, **options):
    torch.manual_seed(0)
    model = Distillation(
        student, build_model(teacher, 'teacher'), dict(boxes=dict(type='LocalizationKD', **options))
    ).train()
    model.progress = 0.0
    return model


def take_step(model, batch, amp=False):
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        return model.train_step(batch, wrapper)['kd.boxes.loss'].item()


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize(
    'kind, options',
    [
        ('GFL', dict()),
        ('GFL', dict(form='iou', region='all', scores='teacher')),
        ('FCOS', dict()),
        ('RetinaNet', dict()),
        ('RetinaNet', dict(form='l1', scores='none')),
    ],
)
def test_detectors_take_a_step(kind, options, amp):
    torch.manual_seed(1)
    model = join(tiny.detector(kind, 4), tiny.detector(kind, 8), **options)
    assert 0 < take_step(model, tiny.detection_batch(((64, 64), (48, 40))), amp) < float('inf')
    assert list(model.distillers.methods.state_dict()) == [] and list(model.distillers.parameters()) == []


def test_gradient_reaches_the_box_branch_alone():
    model = join(tiny.detector('GFL', 4), tiny.detector('GFL', 8))
    data = model.data_preprocessor(tiny.detection_batch(), True)
    model(**data, mode='loss')['kd.boxes.loss'].backward()
    head = model.student.bbox_head
    assert head.gfl_reg.weight.grad.abs().sum() > 0
    assert head.gfl_cls.weight.grad is None  # the scores are weights, no targets


def test_a_first_batch_without_boxes_is_excused():
    model = join(tiny.detector('GFL', 4), tiny.detector('GFL', 8))
    assert take_step(model, tiny.detection_batch(boxes=0)) == 0
    assert take_step(model, tiny.detection_batch()) > 0


def test_a_first_batch_of_boxes_outside_the_images_is_excused():
    """There are boxes, but none of them has a place in either region."""
    model = join(tiny.detector('GFL', 4), tiny.detector('GFL', 8))
    batch = tiny.detection_batch()
    for sample in batch['data_samples']:
        sample.gt_instances.bboxes += 10_000
    assert take_step(model, batch) == 0
    assert take_step(model, tiny.detection_batch()) > 0


def test_families_without_distributions_teach_each_other():
    """FCOS measures from the centre of a cell, RetinaNet has three anchors there."""
    gfl, fcos = tiny.detector('GFL', 4), tiny.detector('FCOS', 8)
    assert take_step(join(gfl, fcos), tiny.detection_batch()) > 0
    with pytest.raises(ConfigError, match='the student has 1 and the teacher 3 per cell'):
        join(gfl, tiny.detector('RetinaNet', 8))
    with pytest.raises(ConfigError, match="student has no tap 'boxes': .*RoIKD"):
        join(tiny.detector('FasterRCNN', 4), fcos)


def test_unequal_reg_max():
    teacher = tiny.detector('GFL', 8)
    teacher['bbox_head']['reg_max'] = 16
    with pytest.raises(ConfigError, match=r'distillers\.boxes.*student has 9 and the teacher 17'):
        join(tiny.detector('GFL', 4), teacher)


FAMILIES = {
    'ATSS': ('atss/atss_r50_fpn_1x_coco.py', {}),
    'TOOD': ('tood/tood_r50_fpn_1x_coco.py', dict(scores='none')),
    'VFNet': ('vfnet/vfnet_r50_fpn_1x_coco.py', {}),
    'RTMDet': ('rtmdet/rtmdet_s_8xb32-300e_coco.py', {}),
    'YOLOX': ('yolox/yolox_s_8xb8-300e_coco.py', {}),
}


@pytest.mark.parametrize('kind', FAMILIES)
def test_stock_heads_take_a_step(kind):
    path, options = FAMILIES[kind]
    config = shrink.read('mmdet', path)
    student, teacher = (shrink.narrow(config, 8) for _ in range(2))
    size = (256, 256)  # group norm wants more than one cell on the coarsest level
    found = shrink.one_step(
        student,
        teacher,
        dict(boxes=dict(type='LocalizationKD', **options)),
        shrink.detection_batch(80, size=size, masks=False),
        size,
    )
    assert 0 < found['losses']['kd.boxes.loss'] < float('inf')
