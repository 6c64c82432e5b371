"""QueryKD against all permutations in float64, and on MMDetection's detection transformers."""

import copy

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.description import Description, Probe, Queries
from kd_dense.distillers import LogitKD, QueryKD
from kd_dense.errors import ConfigError
from kd_dense.losses.queries import foreground
from kd_dense.models.describe import describe
from tests.generality.catalog import DETECTORS
from tests.generality.shrink import detection_batch, narrow, one_step, read
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.queries import ACTIVATIONS, all_costs, boxes, cheapest, kl, overlap
from tests.helpers.toys import nothing_masked

CLASSES, IMAGES = 4, 2
QUERIES_ONLY = dict(memory_weight=0.0)
MEMORY_ONLY = dict(class_weight=0.0, l1_weight=0.0, giou_weight=0.0)


def side(count, layers=2, activation='sigmoid', dtype=torch.float64):
    """What one model predicts: role -> tensors."""
    logits = 2 * torch.randn(layers, IMAGES, count, ACTIVATIONS[activation], dtype=dtype)
    return {'logits': [logits], 'boxes': [boxes(layers, IMAGES, count, dtype=dtype)]}


def memory(name, sizes, channels, dtype=torch.float64):
    """An encoder's output with levels of ``sizes``."""
    levels = [torch.randn(IMAGES, 3, *size, dtype=dtype) for size in sizes]
    cells = sum(h * w for h, w in sizes)
    return {'memory': [torch.randn(IMAGES, cells, channels, dtype=dtype)], f'{name}_levels': levels}


def probe(values, count=0, activation='sigmoid', classes=CLASSES, canvas=(64, 96)):
    shapes = {role: [x.shape for x in tensors] for role, tensors in values.items()}
    queries = Queries(count, classes, activation)
    return Probe(shapes, {role: (role,) for role in values}, canvas, 'none', queries=queries)


def ready(student, teacher, activation='sigmoid', **options):
    """``QueryKD`` after its setup for predictions like these."""
    method = QueryKD(**options)
    sides = [probe(v, v['logits'][0].shape[-2] if 'logits' in v else 0, activation) for v in (student, teacher)]
    method.setup(*sides)
    return method.double()


def brute_force(student, teacher, activation='sigmoid', layers=(-1, -1), temperature=1.0, negative=1.0, limit=None):
    """Class, L1 and GIoU losses of one pair of decoder layers, with the best of all permutations in each image."""
    s, sb, t, tb = (x[0][i] for x, i in zip((student['logits'], student['boxes'], teacher['logits'], teacher['boxes']),
                                            (layers[0], layers[0], layers[1], layers[1]), strict=True))  # fmt: skip
    f = foreground(t, activation)
    limit = min(s.shape[1], t.shape[1], limit or t.shape[1])
    kept = f.argsort(1, descending=True)[:, :limit]
    t, tb = (torch.stack([x[b, kept[b]] for b in range(IMAGES)]) for x in (t, tb))
    f = torch.stack([f[b, kept[b]] for b in range(IMAGES)]).numpy()
    costs = all_costs((s, sb), (t, tb), f, activation)
    s, sb, t, tb = (x.numpy() for x in (s, sb, t, tb))
    sums = np.zeros(3)
    for b in range(IMAGES):
        for j, i in enumerate(cheapest(costs[b])):
            divergence = temperature**2 * kl(s[b, i] / temperature, t[b, j] / temperature, activation)
            sums[0] += (f[b, j] + negative * (1 - f[b, j])) * divergence
            sums[1] += f[b, j] * abs(sb[b, i] - tb[b, j]).sum()
            sums[2] += f[b, j] * (1 - overlap(sb[b, i], tb[b, j]))
    return sums / max(1.0, f.sum()) * (1.0, 5.0, 2.0)


def call(method, student, teacher, context=None):
    losses = method(student, teacher, context or nothing_masked((64, 96)))
    return np.array([losses[name].item() for name in ('class_loss', 'l1_loss', 'giou_loss')])


# -- queries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize(('ours', 'theirs'), [(5, 5), (6, 4), (4, 6)])
def test_equals_the_best_of_all_permutations(activation, ours, theirs):
    student, teacher = side(ours, activation=activation), side(theirs, activation=activation)
    method = ready(student, teacher, activation, **QUERIES_ONLY)
    np.testing.assert_allclose(call(method, student, teacher), brute_force(student, teacher, activation), rtol=1e-9)


def test_options():
    student, teacher = side(5), side(6)
    for limit in (1, 3, 100):
        method = ready(student, teacher, temperature=3.0, negative_weight=0.2, teacher_queries=limit, **QUERIES_ONLY)
        expected = brute_force(student, teacher, temperature=3.0, negative=0.2, limit=limit)
        np.testing.assert_allclose(call(method, student, teacher), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ('ours', 'theirs', 'pairs'),
    [(3, 3, [(0, 0), (1, 1), (2, 2)]), (2, 6, [(0, 2), (1, 5)]), (3, 2, [(0, 0), (1, 1), (2, 1)]), (1, 6, [(0, 5)])],
)
def test_all_decoder_layers(ours, theirs, pairs):
    student, teacher = side(4, ours), side(4, theirs)
    method = ready(student, teacher, layers='all', **QUERIES_ONLY)
    expected = np.mean([brute_force(student, teacher, layers=pair) for pair in pairs], axis=0)
    np.testing.assert_allclose(call(method, student, teacher), expected, rtol=1e-9)


def test_the_order_of_queries_on_either_side_does_not_matter():
    student, teacher = side(6), side(5)
    method = ready(student, teacher, **QUERIES_ONLY)
    expected = call(method, student, teacher)
    for values, count in ((student, 6), (teacher, 5)):
        for role in values:
            values[role] = [values[role][0][:, :, torch.arange(count).roll(2)]]
        np.testing.assert_allclose(call(method, student, teacher), expected, rtol=1e-12)
    student['logits'] = [student['logits'][0].flip(2)]  # classes of one query with the box of another do matter
    assert abs(call(method, student, teacher) - expected).max() > 1e-3


def test_a_student_that_predicts_the_same_set_has_nothing_to_learn():
    teacher = side(6)
    order = torch.randperm(6)
    student = {role: [x[0][:, :, order]] for role, x in teacher.items()}
    np.testing.assert_allclose(call(ready(student, teacher, **QUERIES_ONLY), student, teacher), 0, atol=1e-13)


def test_denoising_queries_come_first_and_are_left_out():
    student, teacher = side(5), side(5)
    method = ready(student, teacher, **QUERIES_ONLY)
    expected = call(method, student, teacher)
    noisy = {role: [torch.cat([side(8)[role][0], x[0]], 2)] for role, x in student.items()}
    assert (call(method, noisy, teacher) == expected).all()
    single = {role: [x[0][-1]] for role, x in student.items()}  # a head that gives one layer without its axis
    assert (call(ready(single, teacher, **QUERIES_ONLY), single, teacher) == expected).all()


def test_gradient_reaches_the_matched_queries_of_the_student_only():
    student, teacher = side(7), side(4)
    method = ready(student, teacher, **QUERIES_ONLY)
    for values in (student, teacher):
        for role in values:
            values[role][0].requires_grad_()
    sum(method(student, teacher, nothing_masked()).values()).backward()
    assert list(method.parameters()) == []
    assert all(teacher[role][0].grad is None for role in teacher)
    for role in student:
        reached = (student[role][0].grad != 0).any(-1)
        assert not reached[0].any() and reached[1].sum(1).tolist() == [4, 4]  # the last layer, the teacher's four


def test_half_precision_is_matched_and_reduced_in_fp32():
    student, teacher = side(6), side(6)
    low = [{role: [x[0].bfloat16()] for role, x in values.items()} for values in (student, teacher)]
    method = ready(student, teacher, **QUERIES_ONLY)
    exact = [{role: [x[0].float()] for role, x in values.items()} for values in low]
    with torch.autocast('cpu', torch.bfloat16):  # would compute the products of the costs in bf16
        losses = method(*low, nothing_masked())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    np.testing.assert_allclose([x.item() for x in losses.values()], call(method, *exact), rtol=1e-5)


def test_one_copy_to_the_host_for_all_images_and_layers():
    student, teacher = side(6, 3) | memory('student', [(4, 6)], 8), side(4, 3) | memory('teacher', [(4, 6)], 8)
    method = ready(student, teacher, layers='all')
    context = Context((64, 96), image_sizes=torch.tensor([[64, 96], [48, 96]]))
    with Operations() as operations:
        method(student, teacher, context)
    assert operations.seen == ['cpu', 'numpy']  # the copy of all costs, and NumPy's view of it
    assert operations.uploads == ['lift_fresh']  # the assignment, back


# -- the encoder's memory ----------------------------------------------------------------------------------------------


def unfolded(values, sizes):
    """NumPy maps ``[B, C, h, w]`` of each level, cell by cell."""
    x, maps, start = values['memory'][0].detach().numpy(), [], 0
    for h, w in sizes:
        level = np.zeros((IMAGES, x.shape[2], h, w))
        for row in range(h):
            for column in range(w):
                level[:, :, row, column] = x[:, start + row * w + column]
        maps.append(level)
        start += h * w
    return maps


def test_memory_is_compared_level_by_level_where_the_image_is():
    fine, coarse = (8, 12), (4, 6)
    student, teacher = memory('student', [fine, coarse], 5), memory('teacher', [fine, coarse], 5)
    method = ready(student, teacher, memory_weight=3.0, **MEMORY_ONLY)
    assert list(method.parameters()) == []
    context = Context((64, 96), image_sizes=torch.tensor([[64, 96], [32, 48]]))
    found = method(student, teacher, context)
    assert list(found) == ['memory_loss']
    levels = []
    for s, t, (h, w) in zip(unfolded(student, [fine, coarse]), unfolded(teacher, [fine, coarse]), [fine, coarse]):
        difference = [(s[0] - t[0]).ravel(), (s[1] - t[1])[:, : h // 2, : w // 2].ravel()]
        levels.append((np.concatenate(difference) ** 2).mean())
    assert found['memory_loss'].item() == pytest.approx(3 * np.mean(levels), rel=1e-10)
    method.use_mask = False
    whole = [
        ((s - t) ** 2).mean() for s, t in zip(unfolded(student, [fine, coarse]), unfolded(teacher, [fine, coarse]))
    ]
    assert method(student, teacher, context)['memory_loss'].item() == pytest.approx(3 * np.mean(whole), rel=1e-10)


def test_memory_of_another_width_and_of_a_teacher_with_more_levels():
    student, teacher = memory('student', [(8, 12), (2, 3)], 5), memory('teacher', [(8, 12), (4, 6), (2, 3)], 7)
    method = ready(student, teacher, **MEMORY_ONLY)
    assert [tuple(c.weight.shape) for c in method.connectors] == [(7, 5, 1, 1)] * 2
    losses = []
    maps = zip(
        unfolded(student, [(8, 12), (2, 3)]), unfolded(teacher, [(8, 12), (4, 6), (2, 3)])[::2], method.connectors
    )
    for s, t, connector in maps:
        weight, bias = (p.detach().numpy() for p in (connector.weight[:, :, 0, 0], connector.bias))
        losses.append(((np.einsum('oc,bchw->bohw', weight, s) + bias[:, None, None] - t) ** 2).mean())
    value = method(student, teacher, nothing_masked((64, 96)))['memory_loss']
    assert value.item() == pytest.approx(np.mean(losses), rel=1e-10)
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(class_weight=-1.0), 'class_weight must be a finite number >= 0, not -1.0'),
        (dict(negative_weight=float('inf')), 'negative_weight must be a finite number >= 0'),
        (dict(memory_weight=0, **MEMORY_ONLY), 'are all 0; give one of them more'),
        (dict(layers='first'), "layers must be one of 'last', 'all', not 'first'"),
        (dict(teacher_queries=0), 'teacher_queries must be None or a whole number >= 1, not 0'),
        (dict(temperature=0), 'temperature must be a finite number > 0'),
        (dict(connector='CSF'), 'connector: the memory needs one for each level'),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        QueryKD(**options)


def test_sets_that_can_not_be_compared():
    values = side(5)
    good = probe(values, 5)
    for bad, message in (
        (probe(values, 5, classes=3), r'the student has 4 classes \(sigmoid\), the teacher 3 \(sigmoid\)'),
        (probe(values, 5, 'softmax'), r'the student has 4 classes \(sigmoid\), the teacher 4 \(softmax\)'),
        (
            probe(values | {'boxes': [torch.zeros(2, 2, 5, 5)]}, 5),
            r'boxes \[2, 2, 5, 5\] of the teacher are no queries',
        ),
        (
            probe(values | {'logits': [torch.zeros(2, 2, 5, 5)]}, 5),
            'of the teacher are no queries with 4 class channels',
        ),
        (Probe(good.shapes, good.names, (64, 96), 'none'), 'the queries of the teacher: it predicts no set of objects'),
    ):
        with pytest.raises(ConfigError, match=message):
            QueryKD(**QUERIES_ONLY).setup(good, bad)


def test_memory_that_can_not_be_compared():
    student = memory('student', [(8, 12), (4, 6)], 5)
    with pytest.raises(
        ConfigError, match=r"do not go together by stride.*stride 8.*teacher's.*stride 16.*memory_weight=0"
    ):
        ready(student, memory('teacher', [(4, 6), (2, 3)], 5), **MEMORY_ONLY)
    broken = memory('teacher', [(8, 12), (4, 6)], 5)
    broken['memory'] = [torch.zeros(IMAGES, 100, 5)]
    with pytest.raises(ConfigError, match='the teacher gives .*not made of the cells of its levels.*memory_weight=0'):
        ready(student, broken, **MEMORY_ONLY)


# -- on real models ----------------------------------------------------------------------------------------------------


def two_stage(queries):
    return tiny.deformable_detr(256, queries=queries) | dict(with_box_refine=True, as_two_stage=True)


#: Student and teacher, of other numbers of queries and mostly of other widths.
MODELS = {
    'Deformable DETR': (tiny.deformable_detr(16, queries=10), tiny.deformable_detr(32, queries=14)),
    'DINO': (tiny.dino(queries=10), tiny.dino(queries=14)),
    'DETR': (tiny.detr(16, queries=10), tiny.detr(32, queries=14)),
    'two-stage Deformable DETR with box refinement': (two_stage(12), two_stage(9)),
    'DINO teaches Deformable DETR': (tiny.deformable_detr(16, queries=10), tiny.dino(queries=14)),
}


def built(student, teacher, **options):
    from kd_dense.models.build import build_model

    teacher = build_model(teacher, 'teacher')
    teacher.init_weights()
    model = Distillation(student, teacher, dict(query=dict(type='QueryKD', **options)))
    model.student.init_weights()
    model.progress = 0.0
    return model.train()


@pytest.mark.parametrize('count', [3, 0])
@pytest.mark.parametrize('pair', MODELS)
def test_a_training_step(pair, count):
    student, teacher = MODELS[pair]
    model = built(copy.deepcopy(student), copy.deepcopy(teacher), layers='all')
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    logs = model.train_step(tiny.detection_batch(boxes=count), wrapper)  # one image is padded
    model.distillers.verify_gradients()
    for name in ('class', 'l1', 'giou', 'memory'):
        assert 0 < logs[f'kd.query.{name}_loss'].item() < float('inf')
    assert any((p != before[name]).any() for name, p in model.student.named_parameters())


FAMILY = ('DETRHead', 'ConditionalDETRHead', 'DABDETRHead', 'DeformableDETRHead', 'DeformableDETR', 'DINOHead')


@pytest.mark.slow
@pytest.mark.parametrize('entry', [pytest.param(m, id=m.name) for m in DETECTORS if m.name in FAMILY])
def test_configs_of_mmdetection(entry):
    config = read('mmdet', entry.config, entry.size)
    student, teacher = (narrow(config, factor) for factor in entry.factors)
    found = one_step(student, teacher, {'query': dict(type='QueryKD')}, detection_batch(80), init=entry.init)
    losses = [found['losses'][f'kd.query.{name}_loss'] for name in ('class', 'l1', 'giou', 'memory')]
    assert all(0 < value < float('inf') for value in losses)


@pytest.mark.slow
def test_ddq_can_teach_but_not_be_taught():
    dino, ddq = (
        narrow(read('mmdet', next(m.config for m in DETECTORS if m.name == name)), 1)
        for name in ('DINOHead', 'DDQDETRHead')
    )
    distillers = {'query': dict(type='QueryKD')}
    found = one_step(dino, ddq, distillers, detection_batch(80), init=True)
    assert 0 < found['losses']['kd.query.class_loss'] < float('inf')
    with pytest.raises(ConfigError, match='DDQDETR predicts with further, dense queries in training'):
        one_step(ddq, dino, distillers, detection_batch(80), init=True)


def test_predictions_are_those_of_the_matching_queries_of_dino():
    model = built(tiny.dino(queries=10), tiny.dino(queries=12), memory_weight=0.0)
    seen = {}
    method = model.distillers.methods['query']
    forward = method.forward
    method.forward = lambda s, t, context: (seen.update(student=s, teacher=t), forward(s, t, context))[1]
    model(**model.data_preprocessor(tiny.detection_batch(), True), mode='loss')
    total = seen['student']['logits'][0].shape[2]
    assert total > 10 and seen['teacher']['logits'][0].shape[2] == 12  # the student's has denoising queries in front
    trimmed = {role: [x[0][:, :, total - 10 :]] for role, x in seen['student'].items()}
    expected = method(seen['student'], seen['teacher'], nothing_masked())
    found = method(trimmed, seen['teacher'], nothing_masked())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_plain_logit_distillation_of_dino_stays_refused():
    model = describe(built(tiny.dino(), tiny.dino()).student)
    assert 'chosen anew' in model.logits
    with pytest.raises(ConfigError, match='chosen anew'):
        LogitKD().setup(*[Probe({}, {}, (64, 64), model.logits)] * 2)


def test_other_detectors_say_what_they_lack():
    with pytest.raises(
        ConfigError, match="student has no tap 'query_logits': RetinaNet is none of .*distil with LogitKD"
    ):
        built(tiny.detector('RetinaNet'), tiny.dino())
    with pytest.raises(ConfigError, match="teacher has no tap 'query_logits': FasterRCNN is none of .*RoIKD"):
        built(tiny.dino(), tiny.detector('FasterRCNN'))
    with pytest.raises(ConfigError, match=r'student has 6 classes \(sigmoid\), the teacher 6 \(softmax\)'):
        built(tiny.dino(), tiny.detr())
    with pytest.raises(ConfigError, match='the student has 6 classes .*the teacher 5'):
        built(tiny.dino(), tiny.dino(classes=5))
    assert isinstance(Description.queries, str)
