"""The doctor without a toolbox: what is measured, how it is judged, and what is skipped when something is broken."""

from __future__ import annotations

import io
import json
import logging
import math
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from kd_dense import DISTILLERS, ConfigError, Distiller
from kd_dense.analysis.doctor import Toolbox, cost, environment, examine, gradients
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.analysis.doctor.report import Check, Report
from kd_dense.analysis.doctor.scores import compare_scores, weak_teacher
from kd_dense.analysis.doctor.toolbox import Classes, Data, LoadedTeacher, Metric, Preprocessing
from kd_dense.context import Context
from kd_dense.description import Description
from kd_dense.distillation import Distillers
from kd_dense.distillers.base import TapPair
from kd_dense.teacher import LoadReport, Normalization, freeze

CHECKS = [
    *('environment', 'config', 'distillers', 'teacher', 'data', 'student', 'scores', 'classes', 'preprocessing'),
    *('taps', 'gradients', 'cost'),
]


class Line(nn.Module):
    """``z = B (A x)``; the first product is what is tapped."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, width, bias=False)
        self.second = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Deaf(Distiller):
    """Has a connector and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = {'x': TapPair.parse('first')}
        self.connector = nn.Linear(4, 4)

    def forward(self, student, teacher, context):
        return {'loss': (student['x'][0] - teacher['x'][0]).square().mean()}


class Loud(Distiller):
    """A loss of a given factor, which may be infinite after the first step."""

    def __init__(self, later: float = 1.0, sleep: float = 0.0) -> None:
        super().__init__()
        self.taps = {'x': TapPair.parse('first')}
        self.later, self.sleep, self.steps = later, sleep, 0

    def forward(self, student, teacher, context):
        time.sleep(self.sleep)
        self.steps += 1
        loss = (student['x'][0] - teacher['x'][0]).square().mean()
        return {'loss': loss * (self.later if self.steps > 1 else 1.0)}


MIMIC = {'type': 'FeatureMimic', 'taps': 'first'}


@pytest.fixture(autouse=True)
def _registered(monkeypatch) -> None:
    for cls in (Deaf, Loud):
        monkeypatch.setitem(DISTILLERS._module_dict, cls.__name__, cls)


class Bench(Toolbox):
    """A toolbox of matrices.

    Args:
        distillers: as in a config.
        teacher_width: of the first product.
        broken: name of a method -> what it raises instead of working.
        percent: scores of teacher and student.
    """

    name, config, packages, needs_operators, device = 'bench', 'bench.py', (), False, torch.device('cpu')

    def __init__(self, distillers=None, teacher_width=4, broken=(), percent=(80.0, 10.0), classes=(['a'], ['a'])):
        self.settings = distillers or {'mimic': MIMIC}
        self.broken, self.percent, self.names = dict(broken), percent, classes
        self.closed = False
        torch.manual_seed(0)
        self.student, self.teacher = Line(), freeze(Line(teacher_width))
        self.inputs = [torch.randn(5, 3) for _ in range(3)]

    def _try(self, name: str) -> None:
        if name in self.broken:
            raise self.broken[name]

    def check_config(self):
        self._try('config')

    def check_distillers(self):
        self._try('distillers')
        return list(Distillers(self.settings).methods)

    def load_teacher(self):
        self._try('teacher')
        return LoadedTeacher(self.teacher, LoadReport.of(2, 2, 20, 20, 'a.pt'), 'a.pt')

    def open_data(self):
        self._try('data')
        return Data(15, 40, 5)

    def build_student(self):
        self._try('student')
        return self.student

    def score(self, side, count):
        self._try('scores')
        self.counted = count
        return {'top': self.percent[side == 'student'] / 100, 'other': math.nan}

    def metric(self):
        return Metric('top', 'top', 100.0)

    def classes(self):
        return Classes(*self.names)

    def preprocessing(self):
        return Preprocessing(Normalization((1.0,), (2.0,)), Normalization((3.0,), (4.0,)))

    def join(self):
        self._try('taps')
        self.distillers = Distillers(self.settings)
        runs = [lambda m=m: (m(torch.zeros(1, 3)), (1, 1))[1] for m in (self.student, self.teacher)]
        self.distillers.setup(Description(self.student, runs[0]), Description(self.teacher, runs[1]))
        return self.distillers

    def batches(self, count):
        for i in range(count):
            yield self.inputs[i % 3]

    def step(self, batch):
        self._try('gradients')
        active = self.distillers.active(0.0)
        with torch.no_grad(), self.distillers.taps('teacher', active).record() as taps:
            self.teacher(batch)
            teacher = taps.take()
        with self.distillers.taps('student', active).record() as taps:
            task = self.student_step(batch)
            student = taps.take()
        self.distillers(student, teacher, Context((1, 1)), lambda: task)
        return task

    def student_step(self, batch):
        return self.student(batch).square().mean()

    def teacher_step(self, batch):
        self.teacher.first(batch)

    def close(self):
        self.closed = True


def by_hand(bench: Bench, x: np.ndarray, weight: float) -> tuple[float, float]:
    """Share of ``weight * mean((A x - A_T x)^2)`` against ``mean((B A x)^2)``: over A, and at A x."""
    a, b, t = (
        m.weight.detach().double().numpy() for m in (bench.student.first, bench.student.second, bench.teacher.first)
    )
    y = x @ a.T
    z = y @ b.T
    of_task = 2 * z / z.size @ b
    of_term = weight * 2 * (y - x @ t.T) / y.size
    over_a = np.linalg.norm(of_term.T @ x) / np.linalg.norm(of_task.T @ x)
    return over_a, np.linalg.norm(of_term) / np.linalg.norm(of_task)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_gradients_by_hand():
    bench = Bench({'mimic': {**MIMIC, 'loss_weight': 0.3}})
    found = gradients.measure(bench, bench.student, bench.join(), 2)
    term = found.terms['mimic']
    for i in range(2):
        over_a, at_tap = by_hand(bench, bench.inputs[i].double().numpy(), 0.3)
        assert term.share[i] == pytest.approx(over_a, rel=1e-4)
        assert term.share_at_taps[i] == pytest.approx(at_tap, rel=1e-4)
    assert found.task[0] == pytest.approx(bench.student_step(bench.inputs[0]).item())
    assert term.layers == {'first': pytest.approx(term.share[1]), 'second': 0.0}  # the tap lies before the second
    assert term.reaches == ['first'] and term.connectors == {}
    assert term.loss[0] == pytest.approx(
        0.3 * (bench.student.first(bench.inputs[0]) - bench.teacher.first(bench.inputs[0])).square().mean().item()
    )


def test_auto_weight_has_its_share_at_the_taps():
    bench = Bench({'mimic': {**MIMIC, 'loss_weight': {'type': 'auto', 'share': 0.25}}})
    term = gradients.measure(bench, bench.student, bench.join(), 1).terms['mimic']
    assert term.share_at_taps == [pytest.approx(0.25, rel=1e-4)] and term.auto


def test_schedules_are_left_aside_and_come_back():
    late = {**MIMIC, 'loss_weight': {'value': 0.3, 'start': 0.5}}
    bench = Bench({'mimic': late, 'off': {**MIMIC, 'loss_weight': 0}})
    distillers = bench.join()
    found = gradients.measure(bench, bench.student, distillers, 1)
    assert found.terms['mimic'].share[0] == pytest.approx(
        by_hand(bench, bench.inputs[0].double().numpy(), 0.3)[0], rel=1e-4
    )
    assert found.asleep == ['off'] and 'off' not in found.terms
    assert distillers.weights['mimic'].schedule(0.0) == 0 and distillers.active(0.0) == {}


def test_connectors_are_measured_and_nothing_is_left_behind():
    bench = Bench(teacher_width=6)
    before = {k: v.clone() for k, v in bench.student.state_dict().items()}
    distillers = bench.join()
    term = gradients.measure(bench, bench.student, distillers, 1).terms['mimic']
    assert set(term.connectors) == {'connectors.0.weight', 'connectors.0.bias'}
    assert all(norm > 0 for norm in term.connectors.values())
    assert all(p.grad is None for p in (*bench.student.parameters(), *distillers.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in bench.student.state_dict().items())
    assert not distillers.methods['mimic']._forward_hooks


def test_frozen_layers_take_no_part():
    bench = Bench()
    bench.student.second.requires_grad_(False)
    term = gradients.measure(bench, bench.student, bench.join(), 1).terms['mimic']
    assert term.layers == {'first.weight': pytest.approx(term.share[0])}  # one module is left: one level deeper


def test_layer_names():
    assert gradients.layer_names(['a.x', 'b.y.z', 'a.w']) == {'a': ['a.x', 'a.w'], 'b': ['b.y.z']}
    names = ['model.0.conv.weight', 'model.0.bn.weight', 'model.1.conv.weight']
    assert list(gradients.layer_names(names)) == ['model.0', 'model.1']


def term(**values) -> gradients.Gradients:
    settings = dict(weight=1.0, auto=False, loss=[1.0], share=[0.1], share_at_taps=[0.1], layers={'a': 0.1})
    return gradients.Gradients([1.0], {'x': gradients.Term(**{**settings, **values})})


@pytest.mark.parametrize(
    ('values', 'failure', 'warning'),
    [
        ({}, None, None),
        ({'share': [0.004, 0.02, 0.003]}, None, 'distillers.x.loss_weight: its gradient is 0.4 % of that of the task'),
        ({'share': [3.5]}, None, 'distillers.x.loss_weight: its gradient is 350 % of that of the task'),
        ({'share': [None], 'layers': {'a': None}}, None, 'layers in which the task loss has no gradient'),
        ({'loss': [1.0, math.inf]}, 'distillers.x: its loss is inf', None),
        ({'loss': [0.0, 0.0]}, 'distillers.x: its loss is 0 in every iteration', None),
        ({'connectors': {'c.weight': 0.0, 'c.bias': 0.0, 'd.weight': 1.0}}, 'no gradient reached c;', None),
        ({'connectors': {'c.weight': 0.0, 'c.bias': 0.1}}, None, None),
        ({'layers': {'a': 0.0}, 'share': [0.0]}, 'no parameter of the student receives a gradient', None),
    ],
)
def test_judgement(values, failure, warning):
    failures, warnings = gradients.judge(term(**values))
    for found, wanted in ((failures, failure), (warnings, warning)):
        assert len(found) == (wanted is not None) and all(wanted in sentence for sentence in found)


def test_judgement_of_the_task_and_of_other_limits():
    found = term(share=[0.05])
    found.task = [1.0, math.nan]
    assert 'the loss of the task is nan in iteration 2' in gradients.judge(found)[0][0]
    assert gradients.judge(term(share=[0.05]))[1] == [] and gradients.judge(term(share=[0.05]), low=0.06)[1]
    assert gradients.judge(term(share=[3.0]), high=4.0)[1] == []


# -- cost --------------------------------------------------------------------------------------------------------------


def test_kept_for_backward_counts_each_storage_once():
    x, weight = torch.randn(10, 3), nn.Parameter(torch.randn(3, 7))
    with cost.kept_for_backward([weight]) as kept:
        y = x @ weight  # keeps x; the weight is there anyway
        loss = (y.exp() * y).sum()  # keeps exp(y) twice, and y
    assert kept() == 4 * (30 + 70 + 70)
    loss.backward()
    assert weight.grad is not None


def test_times_are_those_of_the_parts():
    bench = Bench({'slow': {'type': 'Loud', 'sleep': 0.02}, 'mimic': MIMIC})
    distillers = bench.join()
    found = cost.measure(bench, bench.student, bench.teacher, distillers, 3)
    # a sleep may take longer on a busy machine, but never shorter
    assert found.terms['slow'].milliseconds >= 20 > found.terms['mimic'].milliseconds
    assert found.step.milliseconds >= 20 > found.student.milliseconds and found.ratio > 1
    assert found.teacher.memory == 4 * (3 * 4 + 4 * 2)
    # the student keeps x [5, 3], A x [5, 4] and z [5, 2]
    assert found.student.memory == 4 * (15 + 20 + 10)
    assert found.terms['slow'].memory == 4 * 20  # the difference, of which the square needs the value
    assert found.step.memory >= found.student.memory + found.terms['slow'].memory
    assert json.loads(json.dumps(found.facts()))['terms']['slow']['memory'] == 80
    assert all(p.grad is None for p in bench.student.parameters())


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('teacher', 'student', 'failed', 'warned'),
    [
        (40, 2, False, False),
        (2, 2, True, False),
        (1, 2, True, False),
        (2.5, 2, False, True),
        (math.nan, 0, True, False),
    ],
)
def test_teacher_must_be_above_the_untrained_student(teacher, student, failed, warned):
    failure, warning = compare_scores(teacher, student, 'AP')
    assert (failure is not None, warning is not None) == (failed, warned)
    if failed:
        assert failure.startswith('teacher.checkpoint: the teacher is not better than the student before training (AP ')


def test_weak_teacher_knows_what_a_constant_can_reach():
    assert 'mIoU 14.00' in weak_teacher(14.0, 'mIoU', 7)  # one class of seven everywhere: at most 14.3
    assert weak_teacher(15.0, 'mIoU', 7) is None
    assert weak_teacher(0.5, 'bbox_mAP', 80) and weak_teacher(None, 'bbox_mAP') and weak_teacher(math.nan, 'bbox_mAP')
    assert weak_teacher(2.0, 'bbox_mAP', 80) is None


# -- environment -------------------------------------------------------------------------------------------------------


def test_environment_names_versions_and_family(monkeypatch):
    facts = environment.environment()
    assert facts['torch'] == torch.__version__ and facts['cores'] >= 1 and facts['memory_bytes'] > 2**28
    installed = {'mmengine': '1', 'mmcv': '2', 'mmdet': '3'}
    monkeypatch.setattr(
        environment, '_installed', lambda names: next(((n, '1') for n in names if n in installed), ('', None))
    )
    assert environment.environment()['openmmlab_family'] == 'original'
    installed['onedl-mmsegmentation'] = '4'
    assert environment.environment()['openmmlab_family'] == 'mixed'
    installed.clear()
    assert environment.environment()['openmmlab_family'] is None
    installed.update({'onedl-mmengine': '1', 'onedl-mmcv': '2'})
    assert environment.environment()['openmmlab_family'] == 'onedl fork'


def test_missing_operators_and_packages_are_problems(monkeypatch):
    monkeypatch.setitem(environment.DISTRIBUTIONS, 'nowhere', ('nowhere',))
    (sentence,) = environment.problems(['nowhere'], True)
    assert sentence.startswith('nowhere is not installed')

    def missing(name):
        raise ImportError('undefined symbol')

    monkeypatch.setattr(environment.importlib, 'import_module', missing)
    (sentence,) = environment.problems([], True)
    assert sentence.startswith('mmcv: its compiled operators (mmcv._ext) do not load (undefined symbol)')
    assert environment.problems([], False) == []


# -- the examination ---------------------------------------------------------------------------------------------------


def run(bench: Bench, **arguments) -> Report:
    return examine(bench, **{'iterations': 1, 'images': 8, **arguments})


def test_all_is_well():
    bench = Bench({'mimic': {**MIMIC, 'loss_weight': 0.1}})
    report = run(bench)
    assert [check.name for check in report.checks] == CHECKS
    assert [check.status for check in report.checks] == ['passed'] * len(CHECKS), report.failures
    assert report.exit_code == 0 and report.verdict == 'doctor: all checks passed' and bench.closed
    assert bench.counted == 8 and report['scores'].facts['images'] == 8
    assert report['preprocessing'].facts['gain'] == [0.5] and report['preprocessing'].facts['shift'] == [-0.5]
    (row,) = report['taps'].facts['rows']
    assert row['student_tensors'] == ({'shape': (4,), 'stride': None},)


def test_a_side_that_does_not_normalise_is_pointed_out(monkeypatch):
    pixels, normalised = Normalization((0.0,), (1.0,)), Normalization((3.0,), (4.0,))
    for sides, warned in (((pixels, normalised), True), ((pixels, pixels), False), ((normalised, normalised), False)):
        bench = Bench({'mimic': {**MIMIC, 'loss_weight': 0.1}})
        monkeypatch.setattr(bench, 'preprocessing', lambda sides=sides: Preprocessing(*sides))
        warnings = run(bench)['preprocessing'].warnings
        assert bool(warnings) == warned
        assert not warned or 'the student has no mean and std' in warnings[0]


def test_scores_all_images_where_a_sample_would_be_as_large():
    bench = Bench()
    run(bench, images=40)
    assert bench.counted is None
    run(bench, images=None)
    assert bench.counted is None


@pytest.mark.parametrize(
    ('broken', 'skipped'),
    [
        ('config', CHECKS[2:]),
        ('distillers', ['taps', 'gradients', 'cost']),
        ('teacher', ['scores', 'classes', 'preprocessing', 'taps', 'gradients', 'cost']),
        ('data', ['scores', 'classes', 'gradients', 'cost']),
        ('student', ['scores', 'preprocessing', 'taps', 'gradients', 'cost']),
        ('scores', []),
        ('taps', ['gradients', 'cost']),
        ('gradients', ['cost']),
    ],
)
def test_what_builds_on_a_failed_check_is_skipped_and_the_rest_is_made(broken, skipped):
    report = run(Bench(broken={broken: ConfigError(f'{broken}.key: is\n  wrong')}))
    assert report.failures == [f'{broken}.key: is wrong'] and report.exit_code == 1
    assert [check.name for check in report.checks] == CHECKS
    assert [check.name for check in report.checks if check.status == 'skipped'] == skipped
    if skipped:
        assert report[skipped[0]].skipped.startswith('needs the check ')
    assert report.verdict.startswith(f'doctor: 1 check failed: {broken}')


def test_other_errors_are_findings_too(capsys):
    report = run(Bench(broken={'gradients': RuntimeError('size of tensor a\nmust match')}))
    assert report.failures == ['gradients: RuntimeError: size of tensor a; the traceback is above']
    assert 'Traceback' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        ({'distillers': {'deaf': {'type': 'Deaf'}}}, 'distillers.deaf: no gradient reached connector; it would stay'),
        ({'distillers': {'a': {**MIMIC, 'loss_weight': 0}}}, 'distillers: every loss_weight is 0'),
        ({'distillers': {'a': {**MIMIC, 'loss_weight': -1}}}, 'distillers.a.loss_weight: must be a finite number >= 0'),
        ({'distillers': {'a': {'type': 'FeatureMimic', 'taps': 'frist'}}}, "no module 'frist'; did you mean 'first'"),
        ({'distillers': {'a': {'type': 'Loud', 'later': math.inf}}}, 'distillers.a: its loss is inf'),
        (
            {'percent': (9.0, 10.0)},
            'the teacher is not better than the student before training (top 9.00 against 10.00)',
        ),
        ({'classes': (['a', 'b'], ['b', 'a'])}, 'the same classes as the student but in another order'),
    ],
)
def test_broken_configs(arguments, sentence):
    report = run(Bench(**arguments), iterations=2)
    assert report.exit_code == 1 and len(report.failures) == 1 and sentence in report.failures[0]


def test_warnings_do_not_fail():
    report = run(Bench({'a': {**MIMIC, 'loss_weight': 1e6}, 'b': {**MIMIC, 'loss_weight': 0}}, classes=(['a'], None)))
    assert report.exit_code == 0 and report.verdict == 'doctor: all checks passed, 3 warnings'
    words = ' '.join(report.warnings)
    assert (
        'which it may drown' in words
        and 'distillers.b.loss_weight: is 0' in words
        and 'the teacher does not say' in words
    )


def test_teacher_that_wakes_up_is_a_failure():
    bench = Bench()
    bench.step = lambda batch: (bench.teacher.train(), Bench.step(bench, batch))[1]
    assert 'teacher: did not stay frozen' in run(bench).failures[0]


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match='at least 1'):
        run(Bench(), iterations=0)


# -- output ------------------------------------------------------------------------------------------------------------


def test_json_is_strict_and_has_the_facts():
    report = run(Bench({'mimic': {**MIMIC, 'loss_weight': 0.1}}))

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(report.to_json(), parse_constant=refuse)
    assert content['exit_code'] == 0 and list(content['checks']) == CHECKS
    scores = content['checks']['scores']['facts']
    assert scores['teacher'] == {'top': 0.8, 'other': None}  # NaN is null
    assert content['checks']['teacher']['facts']['all_parameters'] == 20
    shares = content['checks']['gradients']['facts']['terms']['mimic']
    assert shares['share_median'] == report['gradients'].facts['terms']['mimic']['share'][0]


def test_report_of_infinities():
    report = Report('a.py', 'bench', [Check('x', {'a': [math.inf, {1: math.nan}]})])
    assert json.loads(report.to_json())['checks']['x']['facts'] == {'a': [None, {'1': None}]}


@pytest.mark.parametrize('broken', [None, 'teacher', 'data'])
def test_what_is_printed(broken):
    text = io.StringIO()
    broken = {broken: ConfigError('key: is [wrong]')} if broken else {}
    report = run(Bench(broken=broken), console=Console(file=text, width=150))
    lines = text.getvalue().splitlines()
    assert lines[-1].strip() == report.verdict
    if broken:
        assert '  failed: key: is [wrong]' in lines and any(line.startswith('  needs the check') for line in lines)
    else:
        assert any('teacher: 2/2 tensors, 0.0 M of 0.0 M parameters from a.pt (strict)' in line for line in lines)
        assert any('first: [B, 4]' in line for line in lines)  # the table of taps


def test_quiet_silences_and_gives_back(capsys, caplog):
    with quiet()():
        print('noise')
        logging.getLogger('x').warning('noise')
    print('heard')
    assert capsys.readouterr().out == 'heard\n' and 'noise' not in caplog.text
    with quiet(False)():
        print('heard')
    assert capsys.readouterr().out == 'heard\n'
