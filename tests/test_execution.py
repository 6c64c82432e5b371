"""How a teacher is run: options, precision, compiled parts, and the comparison with the teacher as it was loaded."""

import logging
import math

import pytest
import torch
from torch import nn

from kd_dense.compiled_parts import CompiledParts
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.execution import Execution, current_precision, in_precision, relative_error
from kd_dense.taps import Taps
from kd_dense.teacher import Teacher, is_frozen
from tests.helpers.dispatch import Operations
from tests.test_folding import lived_in

NAMES = ['stem', 'stages.0', 'stages.1.2']


def block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 4)
        self.stages = nn.ModuleList([block(4, 8), block(8, 8), block(8, 8)])
        self.head = nn.Sequential(nn.Conv2d(8, 2, 1))

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def model():
    torch.manual_seed(0)
    return lived_in(Net())


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Run:
    """A teacher with options, and what it said."""

    def __init__(self, names=NAMES, net=None, **options) -> None:
        self.net, self.said = net or model(), []
        self.taps = Taps(self.net, names)
        self.teacher = Teacher(self.net, None, Execution.of(options), self.taps.paths, self.said.append)

    def __call__(self, x=None, taps=None):
        return self.teacher(taps or self.taps, images() if x is None else x, self.net)


def expected(names=NAMES, x=None):
    net = model()
    return Teacher(net)(Taps(net, names), images() if x is None else x, net)


def assert_same(found, wanted, **tolerance):
    assert list(found) == list(wanted)
    for name in wanted:
        for a, b in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(a, b, msg=name, **tolerance)


def errors(found, wanted):
    return {name: relative_error(found[name], wanted[name]) for name in wanted}


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(fuse=1), 'teacher.fuse: must be True or False, not 1'),
        (dict(channels_last='yes'), "teacher.channels_last: must be True or False, not 'yes'"),
        (dict(precision='float16'), "teacher.precision: must be 'fp32', 'bf16' or 'fp16', not 'float16'"),
        (dict(precision='bf16', tolerance=0), 'teacher.tolerance: must be a number above 0'),
        (dict(fuse=True, tolerance=True), 'teacher.tolerance: must be a number above 0'),
        (dict(fuse=True, tolerance=math.nan), 'teacher.tolerance: must be a number above 0'),
        (dict(tolerance=0.1), 'teacher.tolerance: is the limit of what .* none of them is on'),
        (dict(precision='fp32', tolerance=0.1), 'none of them is on'),
        (dict(compile='inductor'), "teacher.compile: must be True, False, or arguments .* not 'inductor'"),
        (dict(compile=dict(backnd='eager')), "teacher.compile: has no option 'backnd'; did you mean 'backend'"),
        (dict(compile=dict(mode='reduce-overhead')), "teacher.compile.mode: 'reduce-overhead' replays CUDA graphs"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Execution.of(options)
    assert '\n' not in str(error.value)


def test_off_by_default():
    for options in ({}, dict(config='a.py', checkpoint='a.pth'), dict(fuse=False, compile=False, precision=None)):
        execution = Execution.of(options)
        assert execution.is_plain and not execution.is_checked and str(execution) == ''
    run = Run()
    assert_same(run(), expected(), rtol=0, atol=0)
    assert run.said == [] and run.teacher._executor is None


# -- each switch gives the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options',
    [
        dict(fuse=True),
        dict(channels_last=True),
        dict(precision='fp32'),
        pytest.param(dict(compile=dict(backend='eager')), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fp32_switches_give_the_same_to_rounding(options):
    """A third batch has another size, for which the tapped modules are counted and the parts compiled again."""
    torch._dynamo.reset()
    run = Run(**options)
    for x in (images(), images(seed=1), images(3, 2), images(seed=3)):
        assert_same(run(x), expected(x=x), rtol=1e-4, atol=1e-5)
    assert is_frozen(run.net)
    assert not any('compile fails' in text for text in run.said)


@pytest.mark.parametrize('precision, close', [('bf16', 0.05), ('fp16', 0.01)])
def test_reduced_precision(precision, close):
    run, seen = Run(precision=precision), []
    run.net.stages[0][0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    for _ in range(2):
        found = run()
        assert all(0 < error < close for error in errors(found, expected()).values())
        assert {t.dtype for ts in found.values() for t in ts} == {torch.float32}  # as connectors and losses expect
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    assert seen == [torch.float32, dtype, dtype]  # the reference, then as asked for
    assert {p.dtype for p in run.net.parameters()} == {torch.float32}
    assert current_precision('cpu') == torch.float32


def test_precision_inside_of_mixed_precision_training():
    in_fp32 = expected()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        plain = Run()()
        for options, dtype in (
            (dict(precision='bf16'), torch.bfloat16),  # the same as that of the training: handed on as without
            (dict(precision='fp16'), torch.float32),
            (dict(precision='fp32'), torch.float32),
        ):
            found = Run(**options)()
            assert {t.dtype for ts in found.values() for t in ts} == {dtype}, options
            if options['precision'] == 'bf16':
                assert_same(found, plain, rtol=0, atol=0)
            if options['precision'] == 'fp32':
                assert_same(found, in_fp32, rtol=0, atol=0)
        run = Run(fuse=True)  # as the training runs, and judged by what that allows
        assert {t.dtype for ts in run().values() for t in ts} == {torch.bfloat16}
        assert 'allowed 0.05' in run.said[-1]
        assert current_precision('cpu') == torch.bfloat16
        with in_precision('cpu', torch.float32):
            assert current_precision('cpu') == torch.float32


def test_norms_are_folded_and_their_operations_gone():
    run = Run(fuse=True)
    run()
    with Operations() as operations:
        run()
    assert not any('batch_norm' in name for name in operations.counts)
    assert run.said[0] == 'teacher: 4 of 4 batch norms are folded into the convolutions before them'
    net = model()
    taps = Taps(net, NAMES)
    for _ in range(2):
        with Operations() as plain:
            Teacher(net)(taps, images(), net)
    assert operations.total < plain.total


@pytest.mark.parametrize('name, count', [('stages.1.0', 3), ('stages.1.1', 4)], ids=['convolution', 'norm'])
def test_a_tapped_convolution_is_not_folded(name, count):
    run = Run([*NAMES, name], fuse=True)
    for _ in range(2):
        assert_same(run(), expected([*NAMES, name]), rtol=1e-4, atol=1e-5)
    assert f'{count} of 4' in run.said[0]


def test_a_tap_of_a_later_distiller_counts_too():
    """Folding looks at all taps there will ever be, not only at those of the first step."""
    net = model()
    early, late = Taps(net, ['stages.1.2']), Taps(net, ['stages.0.0'])
    said = []
    teacher = Teacher(net, None, Execution.of(dict(fuse=True)), [*early.paths, *late.paths], said.append)
    for taps, names in ((early, ['stages.1.2']), (late, ['stages.0.0']), (late, ['stages.0.0'])):
        assert_same(teacher(taps, images(), net), expected(names), rtol=1e-4, atol=1e-5)
    assert sum('relative errors' in text for text in said) == 2  # each tap is compared once


def test_channels_last():
    run, seen = Run(channels_last=True), []
    run.net.stem[0].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    found = run()
    assert all(t.is_contiguous() for ts in found.values() for t in ts)  # mmcv's RoIAlign misreads anything else
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert run.net.stages[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous(memory_format=torch.channels_last)
    found = run(images().contiguous(memory_format=torch.channels_last))  # of a student that runs like this
    assert all(t.is_contiguous(memory_format=torch.channels_last) for ts in found.values() for t in ts)


# -- the comparison ----------------------------------------------------------------------------------------------------


def test_errors_are_said_once_and_follow_the_definition():
    run = Run(precision='bf16')
    found, wanted = run(), expected()
    numbers = {
        name: math.sqrt(((found[name][0] - wanted[name][0]) ** 2).sum() / (wanted[name][0] ** 2).sum())
        for name in NAMES
    }
    listed = ', '.join(f'{name} {number:.1e}' for name, number in numbers.items())
    assert run.said == [f"teacher (precision='bf16'): relative errors of its taps against fp32: {listed}; allowed 0.05"]
    calls = []
    run.net.stem.register_forward_hook(lambda *_: calls.append(1))
    run()
    assert len(run.said) == len(calls) == 1  # no second comparison, no second forward


def test_above_the_tolerance_is_an_error():
    message = r"with precision='bf16' the tap 'st.*' differs .* by \d\.\de-03 of its norm, and 1e-06 is allowed"
    with pytest.raises(ConfigError, match=message) as error:
        Run(precision='bf16', tolerance=1e-6)()
    assert '\n' not in str(error.value)
    Run(precision='bf16', tolerance=math.inf)()


def test_overflow_is_an_error_by_default():
    net = model()
    net.stages[0][1].weight.fill_(1e5)  # more than fp16 can hold
    with pytest.raises(ConfigError, match='differs .* by inf of its norm'):
        Run(net=net, precision='fp16')()
    net = model()
    net.stages[0][1].weight.fill_(1e5)
    Run(net=net, precision='bf16')()


def test_a_wrong_fold_would_be_an_error(monkeypatch):
    monkeypatch.setattr('kd_dense.folding.Watch.pairs', lambda self: [(self._convolutions[0], self._norms[1])])
    with pytest.raises((ConfigError, RuntimeError)):
        Run(fuse=True)()
    monkeypatch.setattr('kd_dense.folding.Watch.pairs', lambda self: [(self._convolutions[1], self._norms[2])])
    with pytest.raises(ConfigError, match='teacher.tolerance: with fuse=True the tap'):
        Run(fuse=True)()


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    assert relative_error([x], [x]) == 0
    assert relative_error([x, torch.tensor([3.0, 4.5])], [x, x]) == pytest.approx(0.1)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_error([x], [torch.zeros(2)]) == math.inf
    assert relative_error([torch.tensor([3.0, math.nan])], [x]) == math.inf
    assert relative_error([x], [x, x]) == relative_error([x[:1]], [x]) == math.inf
    assert relative_error([], []) == 0


def test_the_random_state_is_left_as_it_was():
    run = Run(precision='bf16', fuse=True)
    run.net.stem.register_forward_pre_hook(lambda *_: torch.rand(1) and None)  # stands for what a compiler tries out
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_after_the_first_do_not_wait_for_the_device():
    run = Run(precision='bf16', fuse=True, channels_last=True)
    run()
    with Operations() as operations:
        run()
    assert not operations.seen and not operations.uploads


# -- compiled ----------------------------------------------------------------------------------------------------------


def names_of(net, parts):
    names = {m: n for n, m in net.named_modules()}
    return [names[p] for p in parts]


@pytest.mark.parametrize(
    'tapped, parts',
    [
        (['stem'], ['stem', 'stages.0', 'stages.1', 'stages.2', 'head']),
        (['stages.1.2'], ['stem', 'stages.0', 'stages.2', 'head']),
        (['stem.0', 'stages.1'], ['stages.0', 'stages.1', 'stages.2', 'head']),
    ],
)
def test_parts_have_no_tap_inside(tapped, parts):
    net = model()
    compiled = CompiledParts(net, map(net.get_submodule, tapped), dict(backend='eager'))
    assert names_of(net, compiled.parts) == parts
    with compiled.in_place():
        assert all('forward' in part.__dict__ for part in compiled.parts)
    assert not any('forward' in m.__dict__ for m in net.modules())
    with pytest.raises(ZeroDivisionError), compiled.in_place():
        raise ZeroDivisionError
    assert not any('forward' in m.__dict__ for m in net.modules())


class Counting:
    """A backend of torch.compile that counts the graphs it is given and the calls of what it returns."""

    def __init__(self, fails_at: int = 10**6) -> None:
        self.graphs = self.calls = 0
        self.fails_at = fails_at

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.graphs >= self.fails_at:
            raise ValueError('this backend\nis of no use')

        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


def test_compiled_forward_ends_at_the_deepest_tap():
    torch._dynamo.reset()
    backend = Counting()
    run = Run(['stem', 'stages.1'], compile=dict(backend=backend))
    depth = []
    for stage in (*run.net.stages, run.net.head):
        stage.register_forward_hook(lambda m, i, o: depth.append(m))
    run()
    # the reference ran to the end, to count; compiled were the stem and two stages, not the third, nor the head
    assert depth == [*run.net.stages, run.net.head, run.net.stages[0]]
    assert (backend.graphs, backend.calls) == (3, 3)
    for i in (2, 3):
        assert_same(run(images(seed=i)), expected(['stem', 'stages.1'], images(seed=i)))
        assert (backend.graphs, backend.calls) == (3, 3 * i)  # and nothing is compiled anew
    assert run.net.stages[2] not in depth[4:] and run.net.head not in depth[4:]
    assert not any('forward' in m.__dict__ for m in run.net.modules())  # whoever scores the teacher runs it as it is


@pytest.mark.slow
def test_compiled_by_the_default_backend_of_torch():
    torch._dynamo.reset()
    run = Run(['stem'], compile=True, fuse=True, channels_last=True, precision='fp32')
    for i in range(3):
        assert_same(run(images(seed=i)), expected(['stem'], images(seed=i)), rtol=1e-4, atol=1e-5)
    assert run.teacher._executor._compiled is not None


@pytest.mark.parametrize('fails_at', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_where_compiling_fails_the_teacher_runs_without(fails_at):
    torch._dynamo.reset()
    backend = Counting(fails_at)
    run = Run(compile=dict(backend=backend))
    for i in range(3):
        assert_same(run(images(seed=i)), expected(x=images(seed=i)))
    assert backend.graphs == fails_at  # no second attempt
    (sentence,) = [text for text in run.said if 'fails' in text]
    assert sentence.startswith('teacher.compile: torch.compile fails (') and '\n' not in sentence
    assert sentence.endswith('so the teacher runs without it from here on')


def test_what_is_wrong_with_the_teacher_is_no_fault_of_compiling():
    torch._dynamo.reset()
    run = Run(compile=dict(backend='eager'))
    run()
    with pytest.raises(DistillationError, match='ran'):
        run.teacher(run.taps, images(), lambda x: run.net.stem(x))
    assert run.teacher._executor._compiled is not None
    with pytest.raises(ZeroDivisionError):
        run.teacher(run.taps, images(), lambda x: 1 / 0)


def test_said_by_the_log_of_the_package(caplog):
    net = model()
    taps = Taps(net, NAMES)
    with caplog.at_level(logging.INFO, 'kd_dense'):
        Teacher(net, None, Execution.of(dict(fuse=True)), taps.paths)(taps, images(), net)
    assert '4 of 4 batch norms' in caplog.text
