"""The joined model: equality with Ultralytics' own, and the teacher's contract."""

import copy
import pickle

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel as UltralyticsDistillationModel
from ultralytics.utils.torch_utils import ModelEMA

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.yolo import DistillationModel
from tests.yolo.helpers import FAMILIES, build


def student_of(family, task='', **kwargs):
    model = build(family, task=task, **kwargs)
    model.args = get_cfg(overrides={'imgsz': 64, 'epochs': 3, 'task': 'segment' if task else 'detect', 'dis': 6.0})
    return model


def batch_of(size=64, channels=3, seed=0, empty=False):
    """Two images; the second without objects."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2]])[: 0 if empty else 2]
    return {
        'img': torch.rand(2, channels, size, size, generator=generator),
        'bboxes': boxes,
        'cls': torch.tensor([[0.0], [1.0]])[: len(boxes)],
        'batch_idx': torch.zeros(len(boxes)),
    }


def spread_scores(model):
    """Class scores of an untrained model are all alike; make them differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.model[-1].cv3.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


def join(student, teacher, distillers=None):
    return DistillationModel(
        student, teacher, Distillers(distillers or {'native': {'type': 'Native', 'loss_weight': 6.0}})
    )


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('teacher_family', [None, 'yolo11'])
def test_native_equals_ultralytics(family, teacher_family):
    if teacher_family == family:
        pytest.skip('the same pair as with None')
    student, teacher = student_of(family), build(teacher_family or family, 0.1875, seed=1).eval()
    spread_scores(teacher)
    theirs = UltralyticsDistillationModel(copy.deepcopy(teacher), copy.deepcopy(student)).train()
    ours = join(student, teacher).train()
    connectors = ours.distillers.methods['native'].connectors
    connectors.load_state_dict(theirs.projector.state_dict())
    for size in (64, 96):
        expected, expected_items = theirs.loss(batch_of(size))
        actual, items = ours.loss(batch_of(size))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert items['native'].item() == pytest.approx(expected_items['dis_loss'].item(), rel=1e-5)
        assert items['native'] > 0
        theirs.zero_grad()
        ours.zero_grad()
        expected.sum().backward()
        actual.sum().backward()
        for part, reference in ((ours.student_model, theirs.student_model), (connectors, theirs.projector)):
            wanted = dict(reference.named_parameters())
            own = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
            assert set(own) == {n for n, p in wanted.items() if p.grad is not None}
            largest = max(wanted[n].grad.abs().max().item() for n in own)
            for name, gradient in own.items():
                torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-4, atol=1e-6 * largest)


def test_teacher_is_out_of_reach():
    student, teacher = student_of('yolo11'), build('yolo11', 0.1875, seed=1)
    joined = join(student, teacher)
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for p in joined.parameters()}
    assert not any('teacher' in name for name in joined.state_dict())
    joined.train()
    assert joined.student_model.training
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    average = ModelEMA(joined).ema
    assert average.teacher_model is None
    assert {name.split('.')[0] for name in average.state_dict()} == {'student_model'}
    assert not own & {id(p) for p in average.parameters()}
    assert joined.teacher_model is teacher  # the copy took nothing from the original
    pickled = pickle.dumps(joined)
    assert pickle.loads(pickled).teacher_model is None
    assert len(pickled) < len(pickle.dumps(teacher)) + len(pickle.dumps(student)) * 0.9


def test_teacher_follows_the_type_of_the_student():
    joined = join(student_of('yolo11'), build('yolo11', 0.1875, seed=1))
    joined.double()
    assert next(joined.teacher_model.parameters()).dtype == torch.float64
    assert joined.teacher_model.model[-1].stride.dtype == torch.float64


def test_teacher_runs_before_the_student_and_not_at_all_without_weight():
    student, teacher = student_of('yolo11'), build('yolo11', 0.1875, seed=1)
    weight = {'value': 6.0, 'start': 0.25, 'stop': 0.5}
    joined = join(student, teacher, {'native': {'type': 'Native', 'loss_weight': weight}}).train()
    order = []
    teacher.model[0].register_forward_hook(lambda *_: order.append('teacher'))
    student.model[0].register_forward_hook(lambda *_: order.append('student'))
    for progress, expected in ((0.0, ['student']), (0.25, ['teacher', 'student']), (0.5, ['student'])):
        order.clear()
        joined.progress = progress
        loss, items = joined.loss(batch_of())
        assert order == expected
        assert set(items) == {'box_loss', 'cls_loss', 'dfl_loss', 'native'}
        assert (items['native'] > 0) == (len(expected) == 2)
        assert torch.isfinite(loss).all()


def test_student_alone_has_the_same_task_loss():
    student = student_of('yolo26')
    alone = copy.deepcopy(student).train()
    joined = join(student, build('yolo26', 0.1875, seed=1)).train()
    expected, _ = alone.loss(batch_of())
    actual, _ = joined.loss(batch_of())
    torch.testing.assert_close(actual[: len(expected)], expected)
    for (name, a), b in zip(alone.named_buffers(), student.buffers(), strict=True):
        assert torch.equal(a, b), name  # the dry forward left the running statistics alone


def test_evaluation_gives_the_task_loss_and_runs_no_teacher():
    student, teacher = student_of('yolo11'), build('yolo11', 0.1875, seed=1)
    joined = join(student, teacher).eval()
    teacher.model[0].register_forward_hook(lambda *_: pytest.fail('the teacher ran'))
    with torch.no_grad():
        _, items = joined.loss(batch_of(), joined(batch_of()['img']))
    assert set(items) == {'box_loss', 'cls_loss', 'dfl_loss'}


def test_nothing_is_left_on_the_student():
    student = student_of('yolo11')
    hooks = {name: (len(m._forward_hooks), 'forward' in m.__dict__) for name, m in student.named_modules()}
    joined = join(student, build('yolo11', 0.1875, seed=1)).train()
    joined.loss(batch_of())[0].sum().backward()
    assert {name: (len(m._forward_hooks), 'forward' in m.__dict__) for name, m in student.named_modules()} == hooks


def test_connectors_do_not_depend_on_the_random_state_nor_change_it():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = join(student_of('yolo11', seed=2), build('yolo11', 0.1875, seed=1))
    torch.set_rng_state(before)
    torch.rand(3)
    state = torch.get_rng_state()
    students, teacher = copy.deepcopy(first.student_model), copy.deepcopy(first.teacher_model)
    second = join(students, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.distillers.parameters(), second.distillers.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('empty', [False, True])
def test_context_describes_the_batch(empty):
    joined = join(student_of('yolo11'), build('yolo11', 0.1875, seed=1))
    joined.progress, joined.epoch, joined.iteration = 0.5, 2, 7
    batch = batch_of(size=96, empty=empty)
    context = joined._context(batch)
    assert context.image is batch['img']
    assert (context.canvas, context.progress, context.epoch, context.iteration) == ((96, 96), 0.5, 2, 7)
    assert [len(b) for b in context.boxes] == [0 if empty else 2, 0]
    assert [len(b) for b in context.labels] == [0 if empty else 2, 0]
    if not empty:
        # centre 0.5, 0.5 and size 0.4 x 0.3 of 96 pixels
        torch.testing.assert_close(context.boxes[0][0], torch.tensor([28.8, 33.6, 67.2, 62.4]))
        assert context.labels[0].tolist() == [0, 1]


def test_batches_without_objects_and_other_channels():
    student, teacher = student_of('yolo26', channels=5), build('yolo26', 0.1875, seed=1, channels=5)
    joined = join(student, teacher).train()
    loss, items = joined.loss(batch_of(channels=5, empty=True))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert items['native'] > 0


@pytest.mark.parametrize('type_', ['LogitKD', 'CWD', 'NFD', 'FeatureMimic'])
def test_weight_auto_gives_the_stated_share_of_the_gradient(type_):
    student, teacher = student_of('yolo11'), build('yolo11', 0.1875, seed=1)
    taps = 'logits' if type_ in ('LogitKD', 'CWD') else 'neck'
    config = {'kd': {'type': type_, 'taps': taps, 'loss_weight': {'type': 'auto', 'share': 0.2}}}
    joined = join(student, teacher, config).train()
    captured = []
    names = describe_taps(joined, taps)
    handles = [student.get_submodule(n).register_forward_hook(lambda m, i, o: captured.append(o)) for n in names]
    parts, _ = joined.loss(batch_of())
    for handle in handles:
        handle.remove()
    norms = []
    for value in (parts[:-1].sum(), parts[-1]):
        grads = torch.autograd.grad(value, captured, retain_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
    assert norms[1] / norms[0] == pytest.approx(0.2, rel=1e-4)


@pytest.mark.parametrize('type_', ['Native', 'LogitKD', 'CWD', 'NFD', 'FeatureMimic'])
def test_mixed_precision(type_):
    """Under autocast every loss is float32, finite and near the one in full precision."""
    config = {'kd': {'type': type_, **({'taps': 'neck'} if type_ in ('NFD', 'FeatureMimic') else {})}}
    teacher = build('yolo26', 0.1875, seed=1)
    spread_scores(teacher)
    joined = join(student_of('yolo26'), teacher, config).train()
    expected = joined.loss(batch_of())[1]['kd']
    with torch.autocast('cpu', torch.bfloat16):
        parts, items = joined.loss(batch_of())
    parts.sum().backward()
    assert items['kd'].dtype == parts.dtype == torch.float32
    assert items['kd'].item() == pytest.approx(expected.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in joined.distillers.parameters())


def test_inside_distributed_data_parallel(tmp_path):
    """The wrapper of several GPUs, as Ultralytics calls it, in one process: a sleeping distiller does no harm."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        config = {
            'early': {'type': 'Native', 'loss_weight': {'value': 1.0, 'stop': 0.5}},
            'late': {'type': 'FeatureMimic', 'taps': 'neck', 'loss_weight': {'value': 1.0, 'start': 0.5}},
        }
        joined = join(student_of('yolo11'), build('yolo11', 0.1875, seed=1), config).train()
        wrapped = torch.nn.parallel.DistributedDataParallel(joined, find_unused_parameters=True)
        for progress, name in ((0.0, 'early'), (0.5, 'late'), (0.75, 'late')):
            joined.zero_grad()
            joined.progress = progress
            wrapped(batch_of())[0].sum().backward()
            joined.distillers.verify_gradients()
            learns = {
                n for n, m in joined.distillers.methods.items() if any(p.grad is not None for p in m.parameters())
            }
            assert learns == {name}
    finally:
        torch.distributed.destroy_process_group()


def describe_taps(joined, alias):
    from kd_dense.yolo import describe

    return describe(joined.student_model).aliases[alias]


def test_a_distiller_must_not_take_the_name_of_a_log_column():
    joined = join(student_of('yolo11'), build('yolo11', 0.1875, seed=1), {'box_loss': {'type': 'Native'}}).train()
    with pytest.raises(ConfigError, match=r'distillers\.box_loss: the log already has a column'):
        joined.loss(batch_of())


def test_unknown_tap_names_the_distiller_and_the_closest_path():
    with pytest.raises(ConfigError, match=r"distillers\.a.*'nek'.*'neck'"):
        join(student_of('yolo11'), build('yolo11', 0.1875, seed=1), {'a': {'type': 'FeatureMimic', 'taps': 'nek'}})
