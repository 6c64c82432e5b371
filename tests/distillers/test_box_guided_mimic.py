"""BoxGuidedMimic against loops in float64 on a padded batch of mixed aspect ratio, and on real detectors."""

import math

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from scipy.special import expit

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.description import Logits, Probe
from kd_dense.distillers import BoxGuidedMimic
from kd_dense.errors import ConfigError
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.toys import convolved, resized

CANVAS = (64, 64)
#: Square, wide and narrow images on it.
SIZES = [(64, 64), (48, 64), (64, 40)]
STUDENT, TEACHER = [(3, 3, 8, 8), (3, 5, 4, 4)], [(3, 4, 8, 8), (3, 5, 4, 4)]
TERMS = dict(foreground=2.0, background=0.7, attention=0.3, relation=0.05)


def tensors(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def context_of(boxes, sizes=SIZES):
    boxes = [torch.tensor(b, dtype=torch.float64).reshape(-1, 4) for b in boxes]
    return Context(CANVAS, torch.tensor(sizes), boxes=boxes)


#: Whole pixels: overlapping ones, one within another; none; one at the edge of the padding.
BOXES = [[[3, 5, 30, 40], [20, 20, 64, 64], [24, 24, 32, 32]], [], [[0, 0, 40, 9], [35, 50, 40, 64]]]


def made(student, teacher, scores=(), logits='', canvas=CANVAS, **options):
    method = BoxGuidedMimic(**options)
    extra = {'scores': [x.shape for x in scores]} if scores else {}
    names = {'features': ('neck',), 'scores': ('branch_logits',)}
    method.setup(
        Probe({'features': [x.shape for x in student], **({'scores': []} if scores else {})}, names, canvas, logits),
        Probe({'features': [x.shape for x in teacher], **extra}, names, canvas, logits),
    )
    return method.double()


def call(method, student, teacher, context, scores=()):
    return method({'features': student, 'scores': []}, {'features': teacher, 'scores': list(scores)}, context)


# -- the reference -----------------------------------------------------------------------------------------------------


def valid_cells(size, image, canvas=CANVAS):
    """Cells whose centre lies in the true image."""
    out = np.zeros(size, bool)
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = (i + 0.5) * canvas[0] / size[0], (j + 0.5) * canvas[1] / size[1]
            out[i, j] = y < image[0] and x < image[1]
    return out


def cells_of(box, size, canvas=CANVAS):
    """Cells with a pixel of the box in them."""
    pixels = np.zeros(canvas, bool)
    for y in range(int(box[1]), int(box[3])):
        for x in range(int(box[0]), int(box[2])):
            pixels[y, x] = True
    rows, columns = canvas[0] // size[0], canvas[1] // size[1]
    return pixels.reshape(size[0], rows, size[1], columns).any((1, 3))


def bell_of(box, size, sigma, canvas=CANVAS):
    x1, y1, x2, y2 = (v * n / m for v, n, m in zip(box, size[::-1] * 2, canvas[::-1] * 2, strict=True))
    i, j = np.indices(size)
    sx, sy = max(sigma * (x2 - x1), 0.5), max(sigma * (y2 - y1), 0.5)
    return np.exp(-(((j + 0.5 - (x1 + x2) / 2) / sx) ** 2 + ((i + 0.5 - (y1 + y2) / 2) / sy) ** 2) / 2)


def object_maps(boxes, size, kind, sigma=0.25):
    """Foreground weights and share of objects of one image."""
    boxes = np.asarray(boxes).reshape(-1, 4)
    if kind == 'box':
        maps = [cells_of(box, size) for box in boxes]
        foreground = np.max([m / m.sum() for m in maps], axis=0) if maps else np.zeros(size)
        return foreground, (foreground > 0).astype(float)
    bells = [bell_of(box, size, sigma) for box in boxes]
    zero = np.zeros(size)
    return sum((b / b.sum() for b in bells), zero), np.minimum(sum(bells, zero), 1)


def attentions(x, valid, temperature):
    """Of one image ``[C, h, w]``."""
    if temperature is None:
        return valid.astype(float), np.ones(len(x))
    spatial = np.exp(abs(x).mean(0) / temperature) * valid
    channel = np.exp(abs(x[:, valid]).mean(1) / temperature) if valid.any() else np.ones(len(x))
    return valid.sum() * spatial / max(spatial.sum(), 1e-300), len(x) * channel / channel.sum()


def reference(student, teacher, context, terms, kind='box', temperature=0.5, objects=None):
    """``student``: connected maps. The terms that need no global context."""
    feature = attention = 0.0
    batch = len(student[0])
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        for b in range(batch):
            size = s.shape[2:]
            image = CANVAS if context.image_sizes is None else context.image_sizes[b].tolist()
            valid = valid_cells(size, image)
            foreground, share = objects[level][b] if objects else object_maps(context.boxes[b], size, kind)
            background = (1 - share) * valid
            background = background / max(background.sum(), 1)
            spatial, channel = attentions(t[b], valid, temperature)
            for i, j in np.argwhere(valid):
                weight = terms['foreground'] * foreground[i, j] + terms['background'] * background[i, j]
                error = sum(channel[c] * (s[b, c, i, j] - t[b, c, i, j]) ** 2 for c in range(s.shape[1]))
                feature += weight * spatial[i, j] * error / batch
            own = attentions(s[b], valid, temperature)
            distance = abs(own[0] - spatial).sum() + abs(own[1] - channel).sum()
            attention += terms['attention'] * distance / batch
    return {'feature_loss': feature, 'attention_loss': attention}


def connected(method, student):
    first = convolved(student[0], method.connectors[0])  # 3 -> 4 channels; the second level is as wide on both sides
    return [first, student[1].detach().numpy()]


def assert_equal(losses, expected, rel=1e-6):
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=rel)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', ['box', 'gaussian'])
@pytest.mark.parametrize('temperature', [0.5, 0.8, None])
def test_value_equals_loops(kind, temperature, padded):
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    terms = dict(TERMS, relation=0, attention=TERMS['attention'] if temperature else 0)
    method = made(student, teacher, mask=kind, temperature=temperature, terms=terms)
    context = context_of(BOXES)
    if not padded:
        context.image_sizes = None
    expected = reference(connected(method, student), [t.numpy() for t in teacher], context, terms, kind, temperature)
    if not temperature:
        del expected['attention_loss']
    assert_equal(call(method, student, teacher, context), expected)


def test_padding_is_left_out_only_if_asked_for():
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    terms = dict(TERMS, relation=0)
    method = made(student, teacher, terms=terms, use_mask=False)
    context = context_of(BOXES)
    whole = context_of(BOXES, [CANVAS] * 3)
    expected = reference(connected(method, student), [t.numpy() for t in teacher], whole, terms)
    assert_equal(call(method, student, teacher, context), expected)
    method.use_mask = True
    assert call(method, student, teacher, context)['feature_loss'].item() != pytest.approx(expected['feature_loss'])


def test_an_image_counts_the_same_alone_and_padded_in_a_batch():
    """The batch is the mean of its images, each on its own canvas."""
    small = [t[1:2, :, : 6 // n] for n, t in zip((1, 2), tensors(*STUDENT), strict=True)]  # 48 x 64
    theirs = [t[1:2, :, : 6 // n] for n, t in zip((1, 2), tensors(*TEACHER), strict=True)]
    box = torch.tensor([[5.0, 3, 30, 40]]).double()
    method = made(tensors(*STUDENT), tensors(*TEACHER))
    alone = call(method, small, theirs, Context((48, 64), boxes=[box]))
    pad = [torch.nn.functional.pad(x, (0, 0, 0, x.shape[3] - x.shape[2]), value=7.0) for x in small + theirs]
    padded = call(method, pad[:2], pad[2:], Context(CANVAS, torch.tensor([[48, 64]]), boxes=[box]))
    assert set(alone) == {'feature_loss', 'attention_loss', 'relation_loss'}
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-6, atol=0)


def test_relation_is_the_distance_of_maps_with_their_context():
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    method = made(student, teacher, terms=dict(foreground=0, background=0, attention=0, relation=0.05))
    for block in (*method.contexts, *method.target_contexts):
        torch.nn.init.normal_(block.expand.weight)
    context, total = context_of(BOXES), 0.0
    for i, s in enumerate(connected(method, student)):
        mask = context.mask(s.shape[2:])
        own, other = (
            x + block[i](torch.tensor(x), mask).detach().numpy()
            for x, block in ((s, method.contexts), (teacher[i].numpy(), method.target_contexts))
        )
        total += 0.05 * ((own - other) ** 2 * mask.numpy()).sum() / 3
    assert_equal(call(method, student, teacher, context), {'relation_loss': total})
    assert not method.needs_boxes
    assert_equal(call(method, student, teacher, Context(CANVAS, context.image_sizes)), {'relation_loss': total})


def test_one_object_weighs_as_much_as_another_whatever_its_size():
    """With errors of 1 everywhere the foreground term is the number of objects on each level, times C."""
    student, teacher = tensors(*[(1, 5, 8, 8)] * 2), [torch.zeros(1, 5, 8, 8).double()] * 2
    student = [torch.ones_like(s) for s in student]
    terms = dict(foreground=1.0, background=0, attention=0, relation=0)
    boxes = torch.tensor([[0.0, 0, 8, 8], [16, 16, 64, 64]]).double()
    for kind in ('box', 'gaussian'):
        method = made(student, teacher, mask=kind, temperature=None, terms=terms)
        for count in (1, 2):
            (value,) = call(method, student, teacher, Context(CANVAS, boxes=[boxes[:count]])).values()
            assert value.item() == pytest.approx(2 * 5 * count, rel=1e-6)


def test_background_is_normalised_by_its_size():
    student, teacher = [torch.ones(1, 5, 8, 8).double()], [torch.zeros(1, 5, 8, 8).double()]
    method = made(student, teacher, temperature=None, terms=dict(foreground=0, background=1, attention=0, relation=0))
    for box in ([], [[0.0, 0, 8, 8]], [[0.0, 0, 64, 56]]):
        context = Context(CANVAS, boxes=[torch.tensor(box).reshape(-1, 4)])
        assert call(method, student, teacher, context)['feature_loss'].item() == pytest.approx(5, rel=1e-6)
    covered = Context(CANVAS, boxes=[torch.tensor([[0.0, 0, 64, 64]])])
    assert call(method, student, teacher, covered)['feature_loss'] == 0


def test_an_overhang_of_one_adds_a_row_and_a_column():
    student, teacher = [torch.zeros(1, 1, 8, 8).double()], [torch.zeros(1, 1, 8, 8).double()]
    terms = dict(foreground=1, background=0, attention=0, relation=0)
    student[0][0, 0, 3, 2] = 1  # below the box
    context = Context(CANVAS, boxes=[torch.tensor([[8.0, 8, 24, 24]])])
    values = [
        call(made(student, teacher, temperature=None, terms=terms, overhang=n), student, teacher, context)
        for n in (0, 1)
    ]
    assert [v['feature_loss'].item() for v in values] == pytest.approx([0, 1 / 9])


def test_teacher_of_another_resolution():
    student, teacher = tensors((3, 4, 8, 8)), tensors((3, 4, 16, 16))
    terms = dict(TERMS, relation=0)
    method = made(student, teacher, terms=terms)
    context = context_of(BOXES)
    small = resized(teacher[0].numpy(), (8, 8))
    assert_equal(
        call(method, student, teacher, context), reference([student[0].numpy()], [small], context, terms), 1e-5
    )


# -- score masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('branches', [1, 2])
@pytest.mark.parametrize('anchors', [1, 3])
def test_scores_in_place_of_boxes(anchors, branches):
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    # the head has a level more than the features that are compared
    given = [tensors(*[(3, 2 * anchors, n, n) for n in (8, 4, 2)]) for _ in range(branches)]
    flat = [x for branch in given for x in branch]
    terms = dict(TERMS, relation=0)
    method = made(student, teacher, flat, Logits(2, 'sigmoid'), mask='scores', terms=terms)
    assert not method.needs_boxes
    context = Context(CANVAS, torch.tensor(SIZES))
    scores = []
    for level, n in enumerate((8, 4)):
        mean = sum(branch[level].numpy() for branch in given) / branches
        valid = np.array([valid_cells((n, n), size) for size in SIZES])
        scores.append(expit(mean).max(1) * valid)
    objects = [
        [(scores[level][b] * 2 / sum(s[b].sum() for s in scores), scores[level][b]) for b in range(3)]
        for level in range(2)
    ]
    expected = reference(connected(method, student), [t.numpy() for t in teacher], context, terms, objects=objects)
    assert_equal(call(method, student, teacher, context, flat), expected)


def test_scores_of_levels_of_one_size_go_by_their_order():
    """The coarsest levels of a small image are one cell each."""
    shapes = [(1, 2, 2, 2), (1, 2, 1, 1), (1, 2, 1, 1)]
    student, teacher, scores = tensors(*shapes), tensors(*shapes), tensors(*shapes * 2)
    method = made(student, teacher, scores, Logits(2, 'sigmoid'), mask='scores')
    assert method._branches == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    'scores, logits, message',
    [
        ([(3, 2, 8, 8)] * 2, 'a two-stage detector has none', "teacher's class scores: a two-stage detector has none"),
        ([(3, 2, 8, 8)] * 2, Logits(2, 'softmax'), "with mask='scores' needs a teacher with a dense sigmoid head"),
        ([(3, 2, 8, 8)] * 2, Logits(2, 'sigmoid', 'query'), "dense sigmoid head; use mask='box'"),
        ([(3, 2, 8, 8)], Logits(2, 'sigmoid'), 'are not those of all of its features .*levels that feed its head'),
    ],
)
def test_teachers_without_scores(scores, logits, message):
    with pytest.raises(ConfigError, match=message):
        made(tensors(*STUDENT), tensors(*TEACHER), tensors(*scores), logits, mask='scores')


# -- boxes that are not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['box', 'gaussian'])
def test_a_batch_without_boxes_is_all_background(kind):
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    context = context_of([[], [], []])
    terms = dict(TERMS, relation=0)
    method = made(student, teacher, mask=kind, terms=terms)
    expected = reference(connected(method, student), [t.numpy() for t in teacher], context, terms, kind)
    assert_equal(call(method, student, teacher, context), expected)
    only = made(student, teacher, mask=kind, terms=dict(foreground=1, background=0, attention=0, relation=0))
    student = [s.requires_grad_() for s in student]
    (value,) = call(only, student, teacher, context).values()
    value.backward()
    assert value == 0 and all((s.grad == 0).all() for s in student)
    assert only.needs_boxes and method.needs_boxes


def test_a_task_without_boxes():
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    with pytest.raises(ConfigError, match='BoxGuidedMimic needs ground-truth boxes'):
        call(made(student, teacher), student, teacher, Context(CANVAS))


# -- gradients, precision, operations ----------------------------------------------------------------------------------


def test_gradients_go_to_student_and_connectors_only():
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    method = made(student, teacher)
    for x in (*student, *teacher):
        x.requires_grad_()
    sum(call(method, student, teacher, context_of(BOXES)).values()).backward()
    assert all(s.grad.abs().sum() > 0 for s in student) and all(t.grad is None for t in teacher)
    for name, parameter in method.named_parameters():
        if name != 'connectors.0.bias':
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('kind', ['box', 'gaussian'])
def test_gradcheck(kind):
    student, teacher = tensors((2, 3, 4, 4)), tensors((2, 3, 4, 4))
    method = made(student, teacher, mask=kind)
    context = context_of(BOXES[::2], SIZES[:2])

    def total(s):
        return sum(call(method, [s], teacher, context).values())

    assert torch.autograd.gradcheck(total, student[0].requires_grad_())


def test_half_precision_is_reduced_in_fp32():
    student, teacher = ([x.bfloat16() for x in tensors(*shapes)] for shapes in (STUDENT, TEACHER))
    method = made(student, teacher)
    method, context = method.float(), context_of(BOXES)
    with torch.autocast('cpu', torch.bfloat16):
        losses = call(method, student, teacher, context)
    exact = call(method.double(), [s.double() for s in student], [t.double() for t in teacher], context)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=2e-2)


@pytest.mark.parametrize('kind', ['box', 'gaussian', 'scores'])
def test_operations_do_not_grow_with_the_boxes_and_none_waits(kind):
    student, teacher = ([x.float() for x in tensors(*shapes)] for shapes in (STUDENT, TEACHER))
    scores = [torch.randn(3, 2, n, n) for n in (8, 4)] if kind == 'scores' else ()
    method = made(student, teacher, scores, Logits(2, 'sigmoid'), mask=kind).float()
    for s in student:
        s.requires_grad_()
    counts = []
    for count in (1, 50, 200):
        method.zero_grad()
        for s in student:
            s.grad = None
        corners = torch.rand(count, 4) * 20
        context = Context(CANVAS, torch.tensor(SIZES), boxes=[corners + torch.tensor([0, 0, 20, 20])] * 3)
        with Operations() as operations:
            sum(call(method, student, teacher, context, scores).values()).backward()
        assert operations.seen == [] and operations.uploads == []
        counts.append(operations.counts)
    assert counts[0] == counts[1] == counts[2]


# -- options -----------------------------------------------------------------------------------------------------------


def test_defaults():
    method = BoxGuidedMimic()
    assert method.terms == dict(foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6)
    assert method.temperature == 0.5 and method.default_loss_weight == 1.0
    assert list(method.taps) == ['features'] and method.taps['features'].student == ('neck',)
    assert BoxGuidedMimic(mask='scores').taps['scores'].teacher == ('branch_logits',)
    assert BoxGuidedMimic(temperature=None).terms['attention'] == 0
    assert BoxGuidedMimic(terms=dict(relation=0)).terms['foreground'] == 1e-3


def test_blocks_are_made_only_where_they_are_used():
    student, teacher = tensors(*STUDENT), tensors(*TEACHER)
    method = made(student, teacher, terms=dict(relation=0))
    assert [n for n, _ in method.named_parameters()] == ['connectors.0.weight', 'connectors.0.bias']
    whole = made(student, teacher)
    assert len(whole.contexts) == len(whole.target_contexts) == 2


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(mask='circle'), r"mask must be one of \['box', 'gaussian', 'scores'\], not 'circle'"),
        (dict(terms=dict(foregound=1)), "there is no term 'foregound'.*foreground"),
        (dict(terms=dict(foreground=-1)), 'terms.foreground: must be a finite number >= 0, not -1'),
        (dict(terms=dict.fromkeys(TERMS, 0)), 'at least one of them must be greater than 0'),
        (dict(temperature=None, terms=dict(attention=1)), 'terms.attention: needs a temperature'),
        (dict(temperature=0), 'temperature must be a finite number > 0'),
        (dict(sigma=-1), 'sigma must be a finite number > 0'),
        (dict(overhang=0.5), 'overhang must be a whole number of cells >= 0, not 0.5'),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BoxGuidedMimic(**options)


def test_tokens_have_no_place():
    with pytest.raises(ConfigError, match=r'BoxGuidedMimic needs maps \[B, C, h, w\], not neck: \[B, 64, 3\]'):
        made(tensors((1, 64, 3)), tensors((1, 64, 3)))


# -- on real detectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind, options, amp',
    [
        ('RetinaNet', dict(), False),
        ('RetinaNet', dict(), True),
        ('RetinaNet', dict(mask='gaussian'), True),
        ('GFL', dict(mask='scores'), False),
        ('GFL', dict(mask='scores'), True),
        ('FasterRCNN', dict(), False),  # mmcv has no suppression in bf16 on a CPU
    ],
)
def test_takes_a_step_in_a_detector(kind, options, amp):
    from kd_dense.models.build import build_model

    teacher = build_model(tiny.detector(kind, 8), 'teacher')
    config = dict(mimic=dict(type='BoxGuidedMimic', **options))
    model = Distillation(tiny.detector(kind, 4), teacher, config)
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = model.train().train_step(tiny.detection_batch(), wrapper)
    model.distillers.verify_gradients()
    for name in ('feature_loss', 'attention_loss', 'relation_loss'):
        value = logs[f'kd.mimic.{name}']
        assert 0 < value.item() < math.inf and value.dtype == torch.float32


def test_a_first_batch_without_boxes_is_waited_out():
    """Neither proved nor calibrated on it; the next batch with a box does both."""
    from kd_dense.models.build import build_model

    terms = dict(background=0, attention=0, relation=0)
    config = dict(mimic=dict(type='BoxGuidedMimic', terms=terms, loss_weight='auto'))
    model = Distillation(tiny.detector('GFL', 4), build_model(tiny.detector('GFL', 8), 'teacher'), config)
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    empty = model.train().train_step(tiny.detection_batch(boxes=0), wrapper)
    assert empty['kd.mimic.feature_loss'] == 0 and model.distillers.weights['mimic'].needs_calibration
    model.distillers.verify_gradients()
    assert model.train_step(tiny.detection_batch(), wrapper)['kd.mimic.feature_loss'] > 0
    assert not model.distillers.weights['mimic'].needs_calibration
    model.distillers.verify_gradients()
    assert model.train_step(tiny.detection_batch(boxes=0), wrapper)['kd.mimic.feature_loss'] == 0
