"""Distillers, taps, loss weights and teacher together, on small models."""

import copy
import gc
import math
import pickle
import random
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.special import rel_entr, softmax
from torch import nn

from kd_dense.context import Context
from kd_dense.distillation import Distillers, preserve_random_state
from kd_dense.distillers import Distiller, TapPair
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.registry import DISTILLERS
from kd_dense.teacher import Teacher
from tests.helpers.toys import Toy, convolved, describe
from tests.helpers.waits import Waits

MIMIC = dict(type='FeatureMimic', taps='neck')
ALL = dict(
    mimic=MIMIC,
    cwd=dict(type='CWD', loss_weight=2.0),
    nfd=dict(type='NFD', taps='backbone:1'),
    logits=dict(type='LogitKD', temperature=2.0),
)


class Step:
    """A student, a teacher, the distillers between them, and what an adapter does in a step."""

    def __init__(self, config, student=None, teacher=None, setup=True, **description):
        torch.manual_seed(1)
        self.student = student or Toy(4)
        self.model = teacher or Toy(6)
        self.images = torch.randn(2, 3, 16, 24)
        self.distillers = Distillers(config)
        self.sides = describe(self.student, **description), describe(self.model, **description)
        self.context = Context(canvas=(16, 24))
        if setup:
            self.distillers.setup(*self.sides)
            self.teacher = Teacher(self.model)

    def taps(self):
        active = self.distillers.active(self.context.progress)
        student, teacher = (self.distillers.taps(side, active) for side in ('student', 'teacher'))
        with student.record():
            self.task = self.student.loss(self.images)
            values = student.take()
        return values, self.teacher(teacher, self.images, self.model)

    def __call__(self, progress=0.0):
        self.context.progress = progress
        self.values = self.taps()
        self.kept = tuple({k: list(v) for k, v in side.items()} for side in self.values)
        return self.distillers(*self.values, self.context, lambda: self.task)


# -- building ----------------------------------------------------------------------------------------------------------


def test_losses_of_several_distillers_in_one_step():
    step = Step(ALL)
    losses = step()
    assert list(losses) == ['mimic.loss', 'cwd.loss', 'nfd.loss', 'logits.loss']
    (s_taps, t_taps) = step.kept
    connectors = step.distillers.methods['mimic'].connectors
    mimic = [
        ((convolved(s, c) - t.double().numpy()) ** 2).mean()
        for s, t, c in zip(s_taps['neck'], t_taps['neck'], connectors, strict=True)
    ]
    assert losses['mimic.loss'].item() == pytest.approx(np.mean(mimic), rel=1e-5)
    s, t = s_taps['backbone:1'][0], t_taps['backbone:1'][0]
    s, t = convolved(s, step.distillers.methods['nfd'].connectors[0]), t.double().numpy()
    s, t = ((x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5) for x in (s, t))
    assert losses['nfd.loss'].item() == pytest.approx(
        3 * ((s - t) ** 2).mean(), rel=1e-4
    )  # 3 is NFD's own default weight
    logits = [
        (s.detach().double().numpy(), t.double().numpy())
        for s, t in zip(s_taps['logits'], t_taps['logits'], strict=True)
    ]
    kl = [4 * rel_entr(softmax(t / 2, axis=1), softmax(s / 2, axis=1)).sum(1).ravel() for s, t in logits]
    assert losses['logits.loss'].item() == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)
    flat = [(s.reshape(2, 3, -1), t.reshape(2, 3, -1)) for s, t in logits]
    kl = [16 * rel_entr(softmax(t / 4, axis=2), softmax(s / 4, axis=2)).sum(2).mean() for s, t in flat]
    assert losses['cwd.loss'].item() == pytest.approx(2 * np.mean(kl), rel=1e-4)


def test_native_end_to_end():
    step = Step(dict(native=dict(type='Native')), activation='sigmoid')
    losses = step()
    (s_taps, t_taps), total = step.kept, 0.0
    for s, t, z, c in zip(
        s_taps['neck'], t_taps['neck'], t_taps['branch_logits'], step.distillers.methods['native'].connectors
    ):
        projected = convolved(torch.tensor(np.maximum(convolved(s, c[0]), 0)), c[2])
        score = (1 / (1 + np.exp(-z.double().numpy()))).max(1, keepdims=True)
        total += (score * (projected - t.double().numpy()) ** 2).sum() / (score.sum() * 6)
    assert losses['native.loss'].item() == pytest.approx(6 * total, rel=1e-5)
    assert 'branch_logits' not in s_taps  # of the teacher only


def test_student_and_teacher_taps_of_different_names():
    step = Step(dict(mimic=dict(type='FeatureMimic', taps=dict(student='stage2', teacher='backbone:1'))))
    assert step()['mimic.loss'] > 0
    assert list(step.kept[0]) == ['stage2'] and list(step.kept[1]) == ['backbone:1']


def random_states():
    return random.getstate(), tuple(np.random.get_state()[1]), torch.get_rng_state().tolist()


def test_setup_leaves_random_states_modes_and_buffers_as_they_were():
    step = Step(ALL, student=Toy(4, dropout=0.5), setup=False)
    step.student.stage1[1].eval()  # a frozen norm
    modes = {n: m.training for n, m in step.student.named_modules()}
    before, states = random_states(), copy.deepcopy(step.student.state_dict())
    own_run = step.sides[0].run

    def run():
        random.random(), np.random.rand(), torch.rand(1)
        assert not step.student.training
        return own_run()

    step.sides[0].run = run
    step.distillers.setup(*step.sides)
    assert random_states() == before
    assert {n: m.training for n, m in step.student.named_modules()} == modes
    assert all(torch.equal(v, states[k]) for k, v in step.student.state_dict().items())
    assert not any('forward' in m.__dict__ for m in step.student.modules())


def test_random_states_come_back_after_an_error():
    before = random_states()
    with pytest.raises(ZeroDivisionError), preserve_random_state():
        random.random(), np.random.rand(), torch.rand(1)
        raise ZeroDivisionError
    assert random_states() == before


def test_setup_is_deterministic_in_the_seed():
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        step = Step(ALL, setup=False)
        torch.manual_seed(noise)
        step.distillers.setup(*step.sides, seed=seed)
        states.append(step.distillers.state_dict())
    key = 'methods.mimic.connectors.0.weight'
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if v.isfinite().all())
    assert not torch.equal(states[0][key], states[2][key])


def test_table():
    step = Step(dict(mimic=MIMIC, native=dict(type='Native', loss_weight='auto')), activation='sigmoid')
    mimic, features, scores = step.distillers.table
    assert (mimic.distiller, mimic.role, mimic.loss_weight) == ('mimic', 'features', '1')
    assert mimic.student == 'neck: [B, 4, 8, 12] stride 2; [B, 4, 4, 6] stride 4'
    assert mimic.teacher == 'neck: [B, 6, 8, 12] stride 2; [B, 6, 4, 6] stride 4'
    assert mimic.connector_parameters == 2 * (4 * 6 + 6)
    assert features.connector_parameters == 2 * (4 * 6 + 6 + 6 * 6 + 6) and scores.connector_parameters == 0
    assert scores.student == '-' and scores.teacher.startswith('branch_logits: [B, 3, 8, 12]')
    assert features.loss_weight == 'auto, share=0.1'


@pytest.mark.parametrize(
    'config, message',
    [
        (
            dict(type='FeatureMimic', taps='nek'),
            r"distillers.x.taps \(student\): the model has no module 'nek'; did you mean 'neck'",
        ),
        (
            dict(type='FeatureMimic', taps=dict(student='neck', teacher='backbon')),
            r"distillers.x.taps \(teacher\): the model has no module 'backbon'; did you mean 'backbone'",
        ),
        (
            dict(type='FeatureMimic', taps=dict(student='neck', teacher='neck:0')),
            r'distillers.x: taps: the student gives 2 tensors .*stride 2; .*stride 4\) but the teacher 1 .*stride 2',
        ),
        (dict(type='FeatureMimic', taps='spare'), "the module 'spare' did not run"),
        (dict(type='FeatureMimic', taps='neck', connector='Conv'), "distillers.x: connector: unknown connector 'Conv'"),
        (dict(type='Native'), 'distillers.x: Native needs a teacher with a dense sigmoid head'),
    ],
)
def test_errors_of_setup(config, message):
    student, teacher = Toy(4), Toy(6)
    student.spare, teacher.spare = nn.ReLU(), nn.ReLU()
    step = Step(dict(x=config), student, teacher, setup=False)
    with pytest.raises(ConfigError, match=message) as error:
        step.distillers.setup(*step.sides)
    assert '\n' not in str(error.value)


def test_a_model_without_logits_says_why():
    step = Step(dict(x=dict(type='LogitKD')), setup=False)
    step.sides[1].logits = 'its classes belong to proposals'
    with pytest.raises(ConfigError, match='distillers.x: .*teacher.*its classes belong to proposals'):
        step.distillers.setup(*step.sides)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_student_and_connectors_but_not_the_teacher():
    step = Step(ALL)
    sum(step().values()).backward()
    assert all(p.grad is None for p in step.model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in step.distillers.parameters())
    assert all(
        p.grad.abs().sum() > 0 for n, p in step.student.named_parameters() if n != 'stage1.0.bias'
    )  # before a norm
    step.distillers.verify_gradients()


def test_student_gradient_equals_that_of_a_plain_computation():
    """Taps, clones and release change nothing in the gradient."""
    step = Step(dict(mimic=dict(type='FeatureMimic', taps=['stage1.1', 'neck:1'], loss_weight=0.7)))
    for _ in range(2):  # with the clones of the first recording, and without
        step.student.zero_grad()
        losses = step()
        (step.task + losses['mimic.loss']).backward()
        found = {n: p.grad.clone() for n, p in step.student.named_parameters()}
        student, model = copy.deepcopy(step.student), step.model
        student.zero_grad()

        def stages(net, images):
            norm = net.stage1[1](net.stage1[0](images))
            first = norm.relu()
            second = net.stage2[0](first).relu()
            lateral = [net.neck.lateral[0](first), net.neck.lateral[1](second)]
            return norm, lateral

        norm, lateral = stages(student, step.images)
        with torch.no_grad():
            norm_t, lateral_t = stages(model, step.images)
        connectors = step.distillers.methods['mimic'].connectors
        pairs = [(norm, norm_t), (lateral[1], lateral_t[1])]
        mimic = sum(nn.functional.mse_loss(c(s), t) for c, (s, t) in zip(connectors, pairs, strict=True)) / 2
        task = sum((student.head(x) - 1).square().mean() for x in lateral)
        (task + 0.7 * mimic).backward()
        for n, p in student.named_parameters():
            torch.testing.assert_close(found[n], p.grad, msg=n)


# -- what a step costs -------------------------------------------------------------------------------------------------


def test_tapped_tensors_are_let_go():
    step = Step(ALL)
    for _ in range(2):
        values = step.taps()
        teacher_tensors = [weakref.ref(t) for tensors in values[1].values() for t in tensors]
        student_tensors = [weakref.ref(t) for tensors in values[0].values() for t in tensors]
        with torch.no_grad():
            step.distillers(*values, step.context, lambda: step.task)
        del step.task
        gc.collect()
        assert values == ({}, {})
        assert [r() for r in teacher_tensors] == [None] * len(teacher_tensors)
        assert [r() for r in student_tensors] == [None] * len(student_tensors)


@DISTILLERS.register_module()
class Watcher(Distiller):
    """Notes which of the tensors that it was told of are alive when it runs."""

    watched: list = []

    def __init__(self) -> None:
        super().__init__()
        self.taps = {'x': TapPair.parse('head')}

    def forward(self, student, teacher, context):
        self.alive = [r() is not None for r in self.watched]
        return {'loss': student['x'][0].square().mean()}


def test_a_tensor_is_let_go_before_the_next_distiller_runs():
    step = Step(dict(mimic=dict(type='FeatureMimic', taps='backbone:1'), other=dict(type='Watcher')))
    values = step.taps()
    Watcher.watched = [weakref.ref(values[1][name][0]) for name in ('backbone:1', 'head')]
    with torch.no_grad():
        step.distillers(*values, step.context, lambda: step.task)
    assert step.distillers.methods['other'].alive == [False, True]


def test_steps_after_the_first_do_not_wait_for_the_device():
    step = Step(ALL | dict(auto=dict(type='CWD', taps='neck', loss_weight='auto')))
    sum(step().values()).backward()
    step.distillers.verify_gradients()
    step.context.image_sizes = torch.tensor([[16, 20], [12, 24]])
    values = step.taps()
    with Waits() as waits:
        losses = step.distillers(*values, step.context, lambda: step.task)
        sum(losses.values()).backward()
        step.distillers.verify_gradients()
    assert waits.seen == []


def test_active_follows_the_schedule():
    step = Step(
        dict(
            early=MIMIC | dict(loss_weight=dict(value=1, stop=0.5)),
            late=dict(type='LogitKD', loss_weight=dict(value=1, start=0.25)),
            never=dict(type='CWD', loss_weight=0),
        )
    )
    names = {p: list(step.distillers.active(p)) for p in (0, 0.3, 0.7)}
    assert names == {0: ['early'], 0.3: ['early', 'late'], 0.7: ['late']}
    only = Distillers(dict(x=dict(type='CWD', loss_weight=dict(value=1, start=0.2, stop=0.8))))
    assert [bool(only.active(p)) for p in (0, 0.2, 0.5, 0.8, 1)] == [False, True, True, False, False]
    assert [list(step(p)) for p in (0, 0.3, 0.7)] == [['early.loss'], ['early.loss', 'late.loss'], ['late.loss']]


def test_the_teacher_runs_only_as_deep_as_active_distillers_ask():
    step = Step(
        dict(
            shallow=dict(type='FeatureMimic', taps='backbone:0'),
            deep=dict(type='LogitKD', loss_weight=dict(value=1, start=0.5)),
        )
    )
    calls = []
    for name in ('stage1', 'stage2', 'head'):
        getattr(step.model, name).register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    step(0.0), step(0.9)  # the first forward of each set of taps runs to the end and counts
    calls.clear()
    step(0.1)
    assert calls == []  # stopped inside stage1, before its hooks
    step(1.0)
    assert calls[:2] == ['stage1', 'stage2'] and calls.count('head') == 1  # stopped inside the second call of the head


def test_idle_distillers_give_their_connectors_a_zero_gradient():
    step = Step(dict(now=MIMIC, later=dict(type='CWD', taps='neck', loss_weight=dict(value=1, start=0.5))))
    losses = step(0.0)
    idle = step.distillers.idle(0.0)
    assert idle.item() == 0
    (sum(losses.values()) + idle).backward()
    assert all((p.grad == 0).all() for p in step.distillers.methods['later'].parameters())
    assert all((p.grad != 0).any() for p in step.distillers.methods['now'].parameters())
    assert step.distillers.idle(0.7) is None
    assert Step(dict(kd=dict(type='LogitKD', loss_weight=dict(value=1, start=0.5)))).distillers.idle(0) is None


# -- auto weights ------------------------------------------------------------------------------------------------------


def norm(loss, at):
    grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(g.double().square().sum().item() for g in grads if g is not None))


@pytest.mark.parametrize('share', [0.1, 2.0])
@pytest.mark.parametrize('taps', ['neck', 'backbone:1', ['neck:1', 'stage1']])
def test_auto_weight_gives_the_stated_share_of_the_task_gradient(taps, share):
    step = Step(dict(mimic=dict(type='FeatureMimic', taps=taps, loss_weight=dict(type='auto', share=share))))
    loss = step()['mimic.loss']
    at = [x for tensors in step.kept[0].values() for x in tensors]
    assert norm(loss, at) == pytest.approx(share * norm(step.task, at), rel=1e-5)
    # fixed from then on
    weight = step.distillers.weights['mimic']
    value = weight(0)
    step.images = 3 * step.images
    step()
    assert weight(0) == value


def test_auto_weight_at_a_tap_that_is_overwritten_in_place():
    """The norm before an in-place ReLU: the distiller gets a clone, which the task loss does not depend on."""
    step = Step(dict(mimic=dict(type='FeatureMimic', taps='stage1.1', loss_weight='auto')))
    step()
    weight = step.distillers.weights['mimic'](0)
    student = copy.deepcopy(step.student)
    before = student.stage1[1](student.stage1[0](step.images))
    first = before.relu()
    maps = student.neck([first, student.stage2(first)])
    task = sum((student.head(x) - 1).square().mean() for x in maps)
    with torch.no_grad():
        target = step.model.stage1[1](step.model.stage1[0](step.images))
    mimic = nn.functional.mse_loss(step.distillers.methods['mimic'].connectors[0](before), target)
    assert weight == pytest.approx(0.1 * norm(task, [before]) / norm(mimic, [before]), rel=1e-4)


@pytest.mark.parametrize('size', [1e-6, 1e3])
def test_auto_weight_does_not_suffer_from_half_precision(size):
    """At an fp16 tap small gradients underflow unless the loss is scaled up, and large ones overflow if it is."""
    weights = []
    for enabled in (False, True):
        step = Step(dict(mimic=dict(type='FeatureMimic', taps='neck', loss_weight='auto')))
        with torch.autocast('cpu', torch.float16, enabled=enabled):
            values = step.taps()
            assert (values[0]['neck'][0].dtype == torch.float16) == enabled
            step.distillers(*values, step.context, lambda step=step: size * step.task)
        weights.append(step.distillers.weights['mimic'](0))
    assert weights[1] == pytest.approx(weights[0], rel=0.02)


def test_auto_weight_is_calibrated_when_the_distiller_begins():
    step = Step(dict(mimic=MIMIC | dict(loss_weight=dict(type='auto', start=0.3, warmup=0.2))))
    assert not step.distillers.active(0.2) and not step.distillers.active(0.3)
    loss = step(0.4)['mimic.loss']
    at = step.kept[0]['neck']
    assert norm(loss, at) == pytest.approx(0.5 * 0.1 * norm(step.task, at), rel=1e-5)


def test_auto_weight_does_not_disturb_the_backward():
    results = []
    for weight in ('auto', 0.1234):
        step = Step(dict(mimic=MIMIC | dict(loss_weight=weight)))
        if weight != 'auto':
            step.distillers.weights['mimic'] = type(step.distillers.weights['mimic'])(results[0][0])
        losses = step()
        (step.task + losses['mimic.loss']).backward()
        results.append((step.distillers.weights['mimic'](0), [p.grad for p in step.student.parameters()]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_teacher_tensors_are_let_go_before_the_calibration():
    step = Step(dict(mimic=MIMIC | dict(loss_weight='auto')))
    step.distillers.methods['mimic'].loss = lambda s, t, mask: (
        s * t.mean()
    ).mean()  # keeps no teacher map for the backward
    values = step.taps()
    teacher = weakref.ref(values[1]['neck'][0])
    alive = []
    step.distillers(*values, step.context, lambda: alive.append(teacher() is not None) or step.task)
    assert alive == [False]


def test_task_loss_is_asked_for_only_while_calibrating():
    asked = []
    step = Step(dict(mimic=MIMIC | dict(loss_weight='auto'), kd=dict(type='LogitKD')))
    for _ in range(2):
        step.distillers(*step.taps(), step.context, lambda: asked.append(1) or step.task)
    assert asked == [1]


def test_auto_weight_where_the_task_loss_does_not_pass():
    step = Step(dict(mimic=MIMIC | dict(loss_weight='auto')))
    values = step.taps()
    with pytest.raises(
        DistillationError, match="distillers.mimic.loss_weight: 'auto' .* task loss has none there; give a number"
    ):
        step.distillers(*values, step.context, lambda: step.student.head.weight.sum())


def test_auto_weight_over_several_processes(tmp_path, monkeypatch):
    """The squared norms are summed over the processes before the root: here as if a second one had the same batch."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        step = Step(dict(mimic=MIMIC | dict(loss_weight='auto')))
        reduced = []
        monkeypatch.setattr(dist, 'all_reduce', lambda t: reduced.append(t.clone()) or t.mul_(torch.tensor([4.0, 1.0])))
        loss = step()['mimic.loss']
        at = step.kept[0]['neck']
        task = norm(step.task, at)
        assert reduced[0].sqrt().tolist()[0] == pytest.approx(task, rel=1e-5)
        # the task's squared norm came back four times as large: twice the weight
        assert norm(loss, at) == pytest.approx(0.1 * 2 * task, rel=1e-5)
    finally:
        dist.destroy_process_group()


# -- proof of life -----------------------------------------------------------------------------------------------------


@DISTILLERS.register_module()
class Constant(Distiller):
    """A loss of a given value, and a connector that may be left out."""

    def __init__(self, value: float, name: str = 'loss', dead: bool = False, times: float = 1.0) -> None:
        super().__init__()
        self.taps = {'x': TapPair.parse('neck:0')}
        self.value, self.name, self.dead, self.times = value, name, dead, times
        self.connector = nn.ModuleDict({'first': nn.Linear(1, 1), 'second': nn.Linear(1, 1)})
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, context):
        x = student['x'][0].mean().reshape(1)
        y = self.connector['first'](x) + (0 if self.dead else self.connector['second'](x)) * self.times
        y = (y * self.scale).sum()
        return {self.name: y * 0 + self.value if self.value is not None else y}


@pytest.mark.parametrize('value', [0.0, math.nan, math.inf, -math.inf])
def test_a_loss_that_is_zero_or_not_finite_in_the_first_step(value):
    step = Step(dict(x=dict(type='Constant', value=value)))
    with pytest.raises(DistillationError, match=f'distillers.x: loss is {value} in its first step'):
        step()


def test_a_loss_that_becomes_zero_later_is_no_error():
    step = Step(dict(x=dict(type='Constant', value=1.0)))
    step()
    step.distillers.methods['x'].value = 0.0
    assert step()['x.loss'] == 0


@DISTILLERS.register_module()
class PerBox(Constant):
    """A loss that is 0 when there is no box."""

    needs_boxes = True

    def forward(self, student, teacher, context):
        (value,) = super().forward(student, teacher, context).values()
        return {'loss': value * sum(map(len, context.boxes))}


@pytest.mark.parametrize('weight', [1.0, 'auto'])
def test_a_first_batch_without_boxes_proves_nothing(weight):
    step = Step(dict(box=dict(type='PerBox', value=None, loss_weight=weight), mimic=MIMIC))
    step.context.boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
    for _ in range(2):
        losses = step()
        sum(losses.values()).backward()
        step.distillers.verify_gradients()
        assert losses['box.loss'] == 0 and losses['mimic.loss'] > 0
    step.context.boxes = [torch.zeros(0, 4), torch.ones(1, 4)]
    losses = step()
    sum(losses.values()).backward()
    step.distillers.verify_gradients()
    assert losses['box.loss'] != 0 and not step.distillers.weights['box'].needs_calibration
    step.context.boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert step()['box.loss'] == 0


def test_a_batch_with_boxes_has_to_give_a_loss():
    step = Step(dict(box=dict(type='PerBox', value=0.0)))
    step.context.boxes = [torch.zeros(0, 4), torch.ones(1, 4)]
    with pytest.raises(DistillationError, match='distillers.box: loss is 0.0 in its first step'):
        step()


def test_a_distiller_that_needs_no_boxes_is_proved_without_them():
    step = Step(dict(x=dict(type='Constant', value=0.0)))
    step.context.boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
    with pytest.raises(DistillationError, match='distillers.x: loss is 0.0 in its first step'):
        step()


def test_all_processes_wait_for_boxes_together(tmp_path, monkeypatch):
    """Here as if a second process had no box."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        step = Step(dict(box=dict(type='PerBox', value=None)))
        step.context.boxes = [torch.ones(1, 4), torch.ones(1, 4)]
        with monkeypatch.context() as patch:
            patch.setattr(dist, 'all_reduce', lambda nothing: nothing.add_(1))
            assert step()['box.loss'] == 0
        assert step()['box.loss'] != 0
    finally:
        dist.destroy_process_group()


def test_a_student_equal_to_its_teacher_is_noticed():
    student = Toy(4)
    step = Step(dict(mimic=MIMIC), student.eval(), copy.deepcopy(student).eval())
    with pytest.raises(DistillationError, match='loss is 0.0 in its first step; check the taps, the teacher'):
        step()


def test_a_loss_of_another_name_is_noticed():
    step = Step(dict(x=dict(type='Constant', value=1.0, name='kd')))
    with pytest.raises(DistillationError, match="distillers.x: calls a loss 'kd'; its name must contain 'loss'"):
        step()


def test_frozen_student_taps_are_noticed():
    step = Step(dict(mimic=dict(type='FeatureMimic', taps='backbone:0'), kd=dict(type='LogitKD')))
    step.student.stage1.requires_grad_(False)
    with pytest.raises(DistillationError, match="distillers.mimic: no gradient would flow through the student's taps"):
        step()


@pytest.mark.parametrize('options', [dict(dead=True), dict(times=0.0)])
def test_a_connector_without_gradient_is_named(options):
    step = Step(dict(mimic=MIMIC, x=dict(type='Constant', value=None, **options)))
    sum(step().values()).backward()
    with pytest.raises(DistillationError, match='distillers.x: no gradient reached connector.second; '):
        step.distillers.verify_gradients()


def test_a_parameter_of_the_distiller_itself_without_gradient_is_named():
    step = Step(dict(x=dict(type='Constant', value=None)))
    losses = step()
    step.distillers.methods['x'].scale.grad = None
    own = step.distillers.methods['x']
    grads = torch.autograd.grad(sum(losses.values()), list(own.connector.parameters()), retain_graph=True)
    assert len(grads) == 4
    for p, g in zip(own.connector.parameters(), grads, strict=True):
        (p * g.detach()).sum().backward()  # a gradient for the connectors only
    with pytest.raises(DistillationError, match='no gradient reached scale; '):
        step.distillers.verify_gradients()


def test_gradients_are_verified_once_for_each_distiller_when_it_begins():
    step = Step(dict(mimic=MIMIC, x=dict(type='Constant', value=None, dead=True, loss_weight=dict(value=1, start=0.5))))
    sum(step(0.0).values()).backward()
    step.distillers.verify_gradients()
    assert not any(p._post_accumulate_grad_hooks for p in step.distillers.parameters())  # no hook is left
    sum(step(0.1).values()).backward()
    step.distillers.verify_gradients()
    sum(step(0.6).values()).backward()
    with pytest.raises(DistillationError, match='connector.second'):
        step.distillers.verify_gradients()


def test_gradients_are_seen_though_the_optimizer_clears_them():
    step = Step(ALL)
    optimizer = torch.optim.SGD([*step.student.parameters(), *step.distillers.parameters()], lr=0.01)
    sum(step().values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step.distillers.verify_gradients()


# -- copies and checkpoints --------------------------------------------------------------------------------------------


def test_state_dict_holds_connectors_and_weights_and_restores_them():
    config = dict(mimic=MIMIC | dict(loss_weight='auto'), cwd=dict(type='CWD'))
    step = Step(config)
    first = step()
    state = step.distillers.state_dict()
    assert set(state) == {
        *(f'methods.mimic.connectors.{i}.{p}' for i in (0, 1) for p in ('weight', 'bias')),
        'weights.mimic.value',
        'weights.cwd.value',
    }
    other = Step(config, setup=False)
    other.distillers.setup(*other.sides, seed=5)
    other.teacher = Teacher(other.model)
    other.distillers.load_state_dict(copy.deepcopy(state))
    second = other()
    assert other.distillers.weights['mimic'](0) == step.distillers.weights['mimic'](0)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_parameters_but_neither_models_nor_taps(copied):
    step = Step(ALL)
    sum(step().values()).backward()  # with the checks of the first step still pending
    other = copied(step.distillers)
    for a, b in zip(step.distillers.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    theirs = {id(m) for model in (step.student, step.model) for m in model.modules()}
    reachable, todo = set(), [other]
    while todo:
        thing = todo.pop()
        if id(thing) not in reachable and not isinstance(thing, type):
            reachable.add(id(thing))
            todo += [r for r in gc.get_referents(thing) if isinstance(r, (nn.Module, dict, list, tuple, set))]
    assert not theirs & reachable
    assert len(pickle.dumps(other)) < 20_000
    other.verify_gradients()
    step.distillers.verify_gradients()  # the original goes on
    assert list(step()) == ['mimic.loss', 'cwd.loss', 'nfd.loss', 'logits.loss']


def test_deep_copy_of_a_module_that_owns_student_and_distillers():
    """As an EMA hook does: student and distillers are copied, the models behind the taps are not copied again."""

    class Owner(nn.Module):
        def __init__(self, step):
            super().__init__()
            self.student, self.distillers, self.teacher = step.student, step.distillers, step.teacher

    step = Step(ALL)
    step()
    owner = Owner(step)
    other = copy.deepcopy(owner)
    assert len(list(other.parameters())) == len(list(owner.parameters()))
    assert other.student is not owner.student and other.teacher is None
    assert list(step()) == ['mimic.loss', 'cwd.loss', 'nfd.loss', 'logits.loss']


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_losses_under_autocast_are_fp32(dtype):
    step = Step(ALL)
    exact = {k: v.item() for k, v in step().items()}
    with torch.autocast('cpu', dtype):
        losses = step()
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert any(t.dtype == dtype for t in step.kept[0]['neck'])
    for key, value in losses.items():
        assert value.item() == pytest.approx(exact[key], rel=0.03), key
