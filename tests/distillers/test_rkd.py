"""Relational distillation: what an example is in each mode, on maps whose pooled embeddings are known, and real models.

The losses themselves are in tests/losses/test_relation.py, the pooling in tests/test_regions.py.
"""

import math

import pytest
import torch
from mmengine.optim import OptimWrapper

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.description import Logits
from kd_dense.distillers import RKD
from kd_dense.distillers.rkd import gather_processes
from kd_dense.errors import ConfigError
from kd_dense.losses.relation import angle_loss, distance_loss
from kd_dense.random_state import step_seed
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.toys import nothing_masked, probe
from tests.losses.test_relation import WORKED
from tests.matrix.test_distributed import two_processes

ROLE = 'features'
TEACHER, STUDENT, DISTANCE, ANGLE = WORKED['right triangle']
CANVAS = (64, 96)
#: Three boxes of 16 x 16 pixels far from each other: two in the first image, one in the second.
BOXES = [torch.tensor([[8.0, 8, 24, 24], [56, 32, 72, 48]]), torch.tensor([[24.0, 40, 40, 56]])]


def painted(embeddings, boxes=BOXES, stride=8, fill=100.0):
    """A map of ``CANVAS`` with one embedding in and around each box, and something else everywhere else."""
    x = torch.full((len(boxes), len(embeddings[0]), CANVAS[0] // stride, CANVAS[1] // stride), fill).double()
    owners = [(i, box) for i, own in enumerate(boxes) for box in own.tolist()]
    for (image, (x1, y1, x2, y2)), embedding in zip(owners, embeddings, strict=True):
        area = slice(int(y1) // stride - 1, int(y2) // stride + 1), slice(int(x1) // stride - 1, int(x2) // stride + 1)
        x[(image, slice(None), *area)] = torch.tensor(embedding).double()[:, None, None]
    return x


def rkd(student, teacher, logits='', canvas=CANVAS, **options):
    method = RKD(**options)
    probes = (probe(ROLE, *(tuple(x.shape) for x in side), canvas=canvas, logits=logits) for side in (student, teacher))
    method.setup(*probes)
    return method


def values(method, student, teacher, context):
    losses = method({ROLE: student}, {ROLE: teacher}, context)
    return {name: value.item() for name, value in losses.items()}


def expect(found, distance=DISTANCE, angle=2 * ANGLE, **tolerance):
    assert found['distance_loss'] == pytest.approx(distance, **(tolerance or dict(abs=5e-8)))
    assert found['angle_loss'] == pytest.approx(angle, **(tolerance or dict(abs=5e-8)))


# -- what an example is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', [None, 'roi'])
def test_boxes_of_all_images_are_one_set(mode):
    student, teacher = [painted(STUDENT)], [painted(TEACHER, fill=-7.0)]
    context = Context(CANVAS, boxes=BOXES)
    expect(values(rkd(student, teacher, mode=mode), student, teacher, context))
    # widths may differ: zeros added are an isometry
    wide = [torch.cat([teacher[0], torch.zeros(2, 3, *teacher[0].shape[2:])], 1)]
    expect(values(rkd(student, wide, mode=mode), student, wide, context))


def test_the_teacher_may_have_another_resolution():
    student, teacher = [painted(STUDENT)], [painted(TEACHER, stride=4)]
    expect(values(rkd(student, teacher), student, teacher, Context(CANVAS, boxes=BOXES)))


def test_weights_and_terms():
    student, teacher, context = [painted(STUDENT)], [painted(TEACHER)], Context(CANVAS, boxes=BOXES)
    expect(
        values(rkd(student, teacher, distance=25, angle=50), student, teacher, context),
        25 * DISTANCE,
        50 * ANGLE,
        rel=1e-4,
    )
    assert list(values(rkd(student, teacher, angle=0), student, teacher, context)) == ['distance_loss']
    assert list(values(rkd(student, teacher, distance=0.0), student, teacher, context)) == ['angle_loss']


def test_boxes_of_different_levels_are_one_set():
    """Two boxes of 128 pixels belong to stride 8, one of 627 pixels to stride 32."""
    canvas = (8 * CANVAS[0], 8 * CANVAS[1])
    small = [8 * BOXES[0][:1], 8 * BOXES[1]]
    boxes = [torch.cat([small[0], torch.tensor([[0.0, 0, *canvas[::-1]]])]), small[1]]
    student, teacher = [], []
    for side, (first, second, third) in ((student, STUDENT), (teacher, TEACHER)):
        fine = painted([first, third], [BOXES[0][:1], BOXES[1]]).repeat_interleave(8, 2).repeat_interleave(8, 3)
        coarse = torch.tensor(second).double()[:, None, None].expand(2, 2, 16, 24)
        side += [fine, coarse]
    method = rkd(student, teacher, canvas=canvas, mode='roi')
    expect(values(method, student, teacher, Context(canvas, boxes=boxes)))


def test_classes_of_all_images_are_one_set_and_ignored_pixels_belong_to_none():
    labels = torch.full((2, *CANVAS), 255)
    for image, box, label in ((0, BOXES[0][0], 0), (0, BOXES[0][1], 4), (1, BOXES[1][0], 4)):
        x1, y1, x2, y2 = box.int().tolist()
        labels[image, y1:y2, x1:x2] = label
    labels[1, :8, :8] = 2  # ignored here
    student, teacher = [painted(STUDENT)], [painted(TEACHER)]
    logits = Logits(5, 'softmax')
    for mode in (None, 'class'):
        for index in (255, 2):
            given = labels.clone() if index == 255 else torch.where(labels == 255, 2, labels)
            given[1, :8, :8] = index
            context = Context(CANVAS, label_map=given, ignore_index=index)
            expect(values(rkd(student, teacher, logits, mode=mode), student, teacher, context))
    assert rkd(student, teacher, logits, mode='class', num_classes=9).num_classes == 9


def test_images_are_pooled_without_their_padding():
    student, teacher = (
        [torch.tensor(e).double()[:, :, None, None].expand(3, 2, 8, 12).clone()] for e in (STUDENT, TEACHER)
    )
    for x in (student[0], teacher[0]):
        x[1, :, 6:], x[2, :, :, 4:] = torch.nan, torch.inf
    context = Context(CANVAS, image_sizes=torch.tensor([[64, 96], [48, 96], [64, 32]]))
    expect(values(rkd(student, teacher, mode='image'), student, teacher, context))
    for x in (student, teacher):  # an image without any pixel that counts is no example
        x[0] = torch.cat([x[0], torch.full((1, 2, 8, 12), torch.nan).double()])
    labels = torch.zeros(4, *CANVAS, dtype=torch.long)
    labels[1, 48:], labels[2, :, 32:], labels[3] = 255, 255, 255
    expect(values(rkd(student, teacher, mode='image'), student, teacher, Context(CANVAS, label_map=labels)))
    vectors = [[torch.tensor(e).double()] for e in (STUDENT, TEACHER)]
    expect(values(rkd(*vectors, mode='image'), *vectors, context))
    tokens = [[torch.tensor(e).double()[:, None].expand(3, 5, 2)] for e in (STUDENT, TEACHER)]
    expect(values(rkd(*tokens, mode='image'), *tokens, context))


def test_cells_of_a_grid():
    """Three cells count: one of the first image, two of the second."""
    student, teacher = [], []
    for side, embeddings in ((student, STUDENT), (teacher, TEACHER)):
        x = torch.full((2, 2, 8, 12), torch.nan).double()
        for (image, rows, columns), e in zip(((0, 0, 0), (1, 0, 0), (1, 4, 0)), embeddings, strict=True):
            x[image, :, rows : rows + 4, columns : columns + 6] = torch.tensor(e).double()[:, None, None]
        side.append(x)
    context = Context(CANVAS, image_sizes=torch.tensor([[32, 48], [64, 48]]))
    expect(values(rkd(student, teacher, mode='grid', grid=2), student, teacher, context))


def test_losses_are_means_over_the_levels():
    labels = torch.randint(0, 4, (2, *CANVAS))
    student, teacher = ([torch.randn(2, c, 8 // n, 12 // n) for c, n in ((3, 1), (5, 2))] for _ in range(2))
    logits, context = Logits(4, 'softmax'), Context(CANVAS, label_map=labels)
    whole = values(rkd(student, teacher, logits, mode='class'), student, teacher, context)
    single = [
        values(rkd([s], [t], logits, mode='class'), [s], [t], context) for s, t in zip(student, teacher, strict=True)
    ]
    for name, value in whole.items():
        assert value == pytest.approx(sum(one[name] for one in single) / 2, rel=1e-5) and value > 0


def test_relations_inside_each_image():
    boxes = [torch.cat([BOXES[0], torch.tensor([[8.0, 40, 24, 56]])]), BOXES[1], torch.zeros(0, 4)]
    s, t = [*STUDENT, (9.0, 9.0)], [*TEACHER, (-3.0, 8.0)]
    student, teacher = [painted(s, boxes)], [painted(t, boxes)]
    expect(values(rkd(student, teacher, per_image=True), student, teacher, Context(CANVAS, boxes=boxes)))
    # two images that have relations, and one that has not: the mean over the two
    boxes = [boxes[0], boxes[0], BOXES[1]]
    student, teacher = (
        [painted([*STUDENT, *STUDENT, (9.0, 9.0)], boxes)],
        [painted([*TEACHER, *STUDENT, (3.0, 8.0)], boxes)],
    )
    context = Context(CANVAS, boxes=boxes)
    expect(values(rkd(student, teacher, per_image=True), student, teacher, context), DISTANCE / 2, ANGLE)
    # the same in mode class, where the device alone knows how many classes an image has
    labels = torch.full((3, *CANVAS), 255)
    for image, own in enumerate(boxes):
        for label, (x1, y1, x2, y2) in enumerate(own.int().tolist()):
            labels[image, y1:y2, x1:x2] = label
    method = rkd(student, teacher, Logits(5, 'softmax'), per_image=True)
    expect(values(method, student, teacher, Context(CANVAS, label_map=labels)), DISTANCE / 2, ANGLE)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_normalised_embeddings(side):
    """Lengths of one side stop to matter, those of the other do not."""
    s, t = [(3.0, 1.0), (1.0, 2.0), (-1.0, 0.5)], [(1.0, 0.5), (0.2, 2.0), (-1.0, -1.0)]
    context = Context(CANVAS, boxes=BOXES)
    lengths = (0.5, 3.0, 7.0)

    def run(s, t):
        maps = [painted(s)], [painted(t)]
        return values(rkd(*maps, **{f'normalize_{side}': True}), *maps, context)

    def scaled(e):
        return [(a * n, b * n) for (a, b), n in zip(e, lengths, strict=True)]

    base = run(s, t)
    own, other = (run(scaled(s), t), run(s, scaled(t))) if side == 'student' else (run(s, scaled(t)), run(scaled(s), t))
    assert own == pytest.approx(base, rel=1e-6) and other['distance_loss'] != pytest.approx(
        base['distance_loss'], rel=1e-2
    )


# -- no relations, and too many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('counts', [(0, 0), (2, 0), (1, 1)])
def test_too_few_boxes_have_exactly_no_loss(counts, per_image):
    boxes = [BOXES[0][:n] for n in counts]
    student, teacher = [torch.randn(2, 2, 8, 12, requires_grad=True)], [torch.randn(2, 4, 8, 12)]
    method = rkd(student, teacher, per_image=per_image)
    losses = method({ROLE: student}, {ROLE: teacher}, Context(CANVAS, boxes=boxes))
    sum(losses.values()).backward()
    assert [v.item() for v in losses.values()] == [0, 0] and (student[0].grad == 0).all()
    assert method.compared_nothing().item()
    method({ROLE: student}, {ROLE: teacher}, Context(CANVAS, boxes=[BOXES[0], BOXES[0]]))
    assert method.compared_nothing().item() == per_image


def test_an_image_that_is_ignored_altogether_has_exactly_no_loss():
    student, teacher = [torch.randn(1, 2, 8, 12, requires_grad=True)], [torch.randn(1, 4, 8, 12)]
    context = Context(CANVAS, label_map=torch.full((1, *CANVAS), 255))
    for mode in ('class', 'grid'):
        method = rkd(student, teacher, Logits(4, 'softmax'), mode=mode)
        losses = method({ROLE: student}, {ROLE: teacher}, context)
        sum(losses.values()).backward()
        assert [v.item() for v in losses.values()] == [0, 0] and (student[0].grad == 0).all()
        assert method.compared_nothing().item()


def many(*counts):
    return [torch.cat([torch.rand(n, 2) * 32, 32 + torch.rand(n, 2) * 32], 1) for n in counts]


def test_more_boxes_than_the_limit_are_drawn_anew_in_each_step_and_alike_after_a_resume():
    boxes = many(30, 4, 0)
    method = RKD(max_examples=12)
    before = torch.get_rng_state()

    def draw(iteration, method=method):
        return torch.cat(method._chosen_boxes(Context(CANVAS, boxes=boxes, iteration=iteration)))

    first = draw(7)
    assert torch.equal(draw(7, RKD(max_examples=12)), first) and len(first) == 12
    assert len({tuple(b) for b in first.tolist()}) == 12 and {tuple(b) for b in first.tolist()} <= {
        tuple(b) for b in torch.cat(boxes).tolist()
    }
    assert not torch.equal(draw(8), first) and not torch.equal(draw(7, RKD(max_examples=12, seed=1)), first)
    assert torch.equal(torch.get_rng_state(), before)
    # every box is as likely as every other: of 2000 draws a share of 12 / 34
    whole = torch.cat(boxes)
    seen = sum((whole[:, None] == draw(i)).all(2).any(1).int() for i in range(2000))
    share = 12 / 34
    assert (seen / 2000 - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 2000)
    kept = RKD(max_examples=12, per_image=True)._chosen_boxes(Context(CANVAS, boxes=boxes))
    assert [len(b) for b in kept] == [12, 4, 0] and torch.equal(kept[1], boxes[1])


def test_more_classes_or_cells_than_the_limit_are_drawn_from_those_that_count():
    tokens, valid = torch.randn(2, 20, 3), torch.rand(2, 20) < 0.5
    method = RKD(mode='class', max_examples=10)
    before = torch.get_rng_state()
    (drawn,) = method._sets(tokens, tokens + 1, valid, Context(CANVAS, iteration=3))
    (again,) = method._sets(tokens, tokens + 1, valid, Context(CANVAS, iteration=3))
    (other,) = method._sets(tokens, tokens + 1, valid, Context(CANVAS, iteration=4))
    assert drawn.student.shape == (10, 3) and drawn.valid.all() and torch.equal(drawn.teacher, drawn.student + 1)
    kept = {tuple(row) for row in tokens[valid].tolist()}
    assert {tuple(row) for row in drawn.student.tolist()} <= kept and len({*map(tuple, drawn.student.tolist())}) == 10
    assert torch.equal(again.student, drawn.student) and not torch.equal(other.student, drawn.student)
    assert torch.equal(torch.get_rng_state(), before)
    few = torch.zeros(2, 20, dtype=torch.bool)
    few[1, :4] = True
    (drawn,) = method._sets(tokens, tokens, few, Context(CANVAS))
    assert drawn.valid.sum() == 4 and len(drawn.valid) == 10


def test_step_seeds():
    assert step_seed(0, 1) == step_seed(0, 1) and len({step_seed(s, i) for s in range(3) for i in range(50)}) == 150
    assert step_seed(1, 11) != step_seed(11, 1)


@pytest.mark.parametrize('mode', ['roi', 'class', 'image', 'grid'])
def test_nothing_waits_for_the_device_and_nothing_loops_over_examples(mode):
    student, teacher = [torch.randn(4, 3, 8, 12)], [torch.randn(4, 5, 16, 24)]
    method = rkd(student, teacher, Logits(6, 'softmax'), mode=mode, max_examples=20)
    labels = torch.randint(0, 6, (4, *CANVAS)) if mode in ('class', 'grid') else None
    sizes = torch.tensor([[64, 96], [48, 96], [64, 80], [64, 96]])
    totals = []
    for counts in ((3, 2, 1, 1), (15, 2, 1, 1)):
        context = Context(CANVAS, image_sizes=sizes, label_map=labels, boxes=many(*counts))
        with Operations() as operations:
            losses = method({ROLE: [student[0].clone().requires_grad_()]}, {ROLE: teacher}, context)
            sum(losses.values()).backward()
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]
    with Operations() as operations:  # a subsample
        method({ROLE: student}, {ROLE: teacher}, Context(CANVAS, sizes, label_map=labels, boxes=many(50, 9, 0, 1)))
    assert operations.seen == [] and operations.uploads == []


def _gathered(rank, world):
    torch.manual_seed(5)
    student, teacher = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    own = slice(None) if world == 1 else slice(3 * rank, 3 * rank + 3)
    own_student = student[own].clone().requires_grad_()
    loss = distance_loss(gather_processes(own_student), gather_processes(teacher[own]))
    loss = loss + angle_loss(gather_processes(own_student), gather_processes(teacher[own]))
    loss.backward()
    return loss.item(), own_student.grad


def test_images_of_all_processes_are_one_set(tmp_path):
    loss, gradient = _gathered(0, 1)
    parts = two_processes(_gathered, tmp_path)
    assert [part[0] for part in parts] == pytest.approx([loss, loss], rel=1e-12)
    # distributed training takes the mean over the processes of the gradients of the weights
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, gradient)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mode='box'), "mode must be one of .*'roi'.*not 'box'"),
        (dict(mode='image', per_image=True), "per_image: mode 'image' has one example per image"),
        (dict(distance=-1), 'distance must be a finite number >= 0, not -1'),
        (dict(angle='much'), "angle must be a finite number >= 0, not 'much'"),
        (dict(distance=0, angle=0), 'both 0, so there is nothing to distil'),
        (dict(max_examples=2), 'max_examples must be a whole number >= 3, not 2'),
        (dict(grid=1), 'grid must be a whole number >= 2'),
        (dict(num_classes=0), 'num_classes must be a whole number >= 1'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        RKD(**options)


def test_taps_that_do_not_fit():
    tokens, maps = [torch.randn(2, 6, 4)], [torch.randn(2, 4, 8, 12)]
    with pytest.raises(
        ConfigError, match=r"RKD pools maps .*features: \[B, 6, 4\] .*tokens and vectors are for mode 'image'"
    ):
        rkd(tokens, tokens)
    uneven = [torch.randn(2, 3, 8, 12), torch.randn(2, 6, 4, 6)]
    with pytest.raises(ConfigError, match='needs levels of equal width, not .*(student).*tap the neck'):
        rkd(uneven, uneven, mode='roi')
    method = rkd(uneven, uneven)  # a segmentor may want that; whether it is one is known by its first batch
    with pytest.raises(ConfigError, match='needs levels of equal width'):
        method({ROLE: uneven}, {ROLE: uneven}, Context(CANVAS, boxes=BOXES))
    with pytest.raises(ConfigError, match='two of equal stride; tap one of them'):
        rkd(maps * 2, maps * 2, mode='roi')


def test_ground_truth_that_is_not_there():
    maps = [torch.randn(2, 4, 8, 12)]
    for mode, message in (
        ('roi', 'needs ground-truth boxes, which'),
        ('class', 'needs a label map, which'),
        (None, 'boxes'),
    ):
        method = rkd(maps, maps, Logits(3, 'softmax'), mode=mode)
        with pytest.raises(ConfigError, match=message):
            method({ROLE: maps}, {ROLE: maps}, nothing_masked(CANVAS))
    with pytest.raises(ConfigError, match='num_classes: mode .class. needs the number of classes'):
        rkd(maps, maps, mode='class')


@pytest.mark.parametrize(
    ('options', 'batch', 'message'),
    [
        (
            dict(mode='image'),
            2,
            "mode: 'image' finds 2 examples here, and relations need 3; take a larger batch, or another",
        ),
        (dict(mode='class', num_classes=2), 1, "mode: 'class' finds 2 examples"),
        (
            dict(mode='class', num_classes=2, per_image=True),
            5,
            'take a larger batch or per_image=False, or another mode',
        ),
    ],
)
def test_relations_that_can_never_be(options, batch, message):
    maps = [torch.randn(batch, 4, 8, 12)]
    context = Context(CANVAS, label_map=torch.randint(0, 2, (batch, *CANVAS)))
    with pytest.raises(ConfigError, match=message):
        rkd(maps, maps, **options)({ROLE: maps}, {ROLE: maps}, context)
    method = rkd(maps, maps, mode='image')  # the last batch of an epoch may be small
    student, teacher, context = torch.randn(4, 4, 8, 12), torch.randn(4, 4, 8, 12), nothing_masked(CANVAS)
    assert all(v > 0 for v in values(method, [student], [teacher], context).values())
    assert all(v == 0 for v in values(method, [student[:2]], [teacher[:2]], context).values())


# -- on real models ----------------------------------------------------------------------------------------------------


def trained(student, teacher, options, batch, amp=False):
    from kd_dense.models.build import build_model

    model = Distillation(student, build_model(teacher, 'teacher'), dict(relations=dict(type='RKD', **options)))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = [{k: v.item() for k, v in model.train().train_step(b, wrapper).items()} for b in batch]
    model.distillers.verify_gradients()
    return logs


@pytest.mark.parametrize(('kind', 'amp'), [('RetinaNet', False), ('RetinaNet', True), ('FasterRCNN', False)])
def test_detectors_take_a_step(kind, amp):
    """The two images differ in size, so one is padded."""
    (logs,) = trained(tiny.detector(kind, 4), tiny.detector(kind, 8), {}, [tiny.detection_batch()], amp)
    for name in ('distance', 'angle'):
        assert 0 < logs[f'kd.relations.{name}_loss'] < 4


@pytest.mark.parametrize('mode', [None, 'image', 'grid'])
def test_segmentors_take_a_step(mode):
    options = dict(taps=['backbone:2', 'backbone:3'], mode=mode)
    (logs,) = trained(tiny.segmentor(4), tiny.segmentor(8), options, [tiny.segmentation_batch(4)])
    for name in ('distance', 'angle'):
        assert 0 < logs[f'kd.relations.{name}_loss'] < 4


@pytest.mark.parametrize('weight', [1.0, dict(type='auto', share=0.1)])
def test_a_first_batch_without_relations_is_no_mistake(weight):
    """Two boxes have none; whether the method works is found out on the next batch."""
    batches = [tiny.detection_batch(boxes=n) for n in (0, 1, 4)]
    options = dict(loss_weight=weight)
    *nothing, something = trained(tiny.detector('RetinaNet', 4), tiny.detector('RetinaNet', 8), options, batches)
    for logs in nothing:
        assert logs['kd.relations.distance_loss'] == logs['kd.relations.angle_loss'] == 0
    assert something['kd.relations.distance_loss'] > 0 and something['kd.relations.angle_loss'] > 0
