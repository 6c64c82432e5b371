"""The benchmark without a toolbox: statistics, counters, made-up objects, and the table. No test looks at a clock."""

from __future__ import annotations

import json
import platform
import resource
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from kd_dense import ConfigError
from kd_dense.analysis.benchmark import Bench, Facts, Measured, Row, Variant, Work, benchmark, made_up, read_variant
from kd_dense.analysis.benchmark import measure as measuring
from kd_dense.analysis.benchmark.measure import WARMUP, Spread, measure
from kd_dense.analysis.benchmark.memory import highest, keep_freed_memory, kept, peak
from kd_dense.analysis.benchmark.report import as_json, markdown, table, write
from kd_dense.analysis.benchmark.variants import title_of
from kd_dense.analysis.benchmark.waits import Waits
from tests.helpers.processes import in_a_fork

CPU = torch.device('cpu')
FACTS = Facts('mmdet', 'cpu', (640, 672), 2, 'SGD', 'fp32', True, 32_000_000, 51_000_000)
MACHINE = {'gpus': [], 'cores': 2, 'threads': 2, 'load': 0.25, 'torch': '2.12.1'}
MIB = 2**20


def row(variant: str = 'CWD', config: str = 'gfl', **parts: Measured) -> Row:
    """In three repetitions: bound 10, 20, 30; step 11, 21, 36 ms; the rival 22, 42, 36 ms."""
    known = {
        'student': Measured([0.008, 0.016, 0.024], 100 * MIB, 80 * MIB, {'nonzero': 3}),
        'teacher': Measured([0.002, 0.004, 0.006], 20 * MIB, 0, {}),
        'step': Measured([0.011, 0.021, 0.036], 112 * MIB, 81 * MIB, {'nonzero': 3, '_local_scalar_dense': 2}),
    }
    return Row(config, variant, {'neck': {'type': 'CWD', 'taps': ('neck',)}}, FACTS, known | parts)


RIVAL = Measured([0.022, 0.042, 0.036], 150 * MIB, 90 * MIB, {})


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('count', [1, 2, 3, 4, 7, 10])
def test_spread_is_that_of_numpy(count):
    values = np.random.default_rng(0).random(count).tolist()
    spread = Spread.of(values)
    expected = np.quantile(values, [0.5, 0.25, 0.75])
    assert [spread.median, spread.low, spread.high] == pytest.approx(expected.tolist())


def test_ratio_is_taken_within_each_repetition():
    """1.1, 1.05 and 1.2: their median is 1.1, while the ratio of the medians would be 1.05."""
    found = row()
    assert found.bound == pytest.approx([0.010, 0.020, 0.030])
    assert found.ratio.median == pytest.approx(1.1)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1.075, 1.15))
    assert found.against('student').median == pytest.approx(11 / 8)
    assert row(native=RIVAL).against('native').median == pytest.approx(0.5)
    assert found.against('native') is None
    assert found.cached is None and row(cached=RIVAL).cached.median == pytest.approx(2.625)  # 22/8, 42/16, 36/24


# -- measuring ---------------------------------------------------------------------------------------------------------


def trained(width: int = 3) -> tuple[nn.Linear, Work]:
    model = nn.Linear(width, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, Work(lambda: model(torch.ones(2, width)).square().sum(), update, [model])


def test_pieces_run_in_turns_and_the_given_times_come_back(monkeypatch):
    ran, clock = [], iter(range(1, 100))

    @contextmanager
    def counting(device):
        yield lambda: next(clock)

    monkeypatch.setattr(measuring, 'stopwatch', counting)
    monkeypatch.setattr(measuring, 'peak', lambda work, device: 7)
    works = {name: Work(lambda name=name: ran.append(name)) for name in 'abc'}
    ticks = []
    found = measure(works, CPU, 4, lambda: ticks.append(0))
    warm, timed, after = ran[: 3 * WARMUP], ran[3 * WARMUP : 3 * WARMUP + 12], ran[3 * WARMUP + 12 :]
    assert warm == list('abc') * WARMUP
    assert timed == list('abcbcacababc')
    assert after == list('abc')  # the counters; nothing is kept by what is not trained
    assert found['a'].seconds == [1, 6, 8, 10] and found['b'].seconds == [2, 4, 9, 11]
    assert found['c'].seconds == [3, 5, 7, 12]
    assert found['a'].peak == 7 and len(ticks) == WARMUP + 4


def test_measuring_leaves_a_model_as_it_was():
    model, work = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = measure({'step': work}, CPU, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(found['step'].seconds) == 2 and found['step'].kept > 0


class Toolbox(Bench):
    """One variant that raises, and one that does not."""

    name, rivals, device = 'toy', ('student', 'native'), CPU

    def __init__(self):
        self.asked, self.closed = [], False

    def prepare(self):
        return FACTS

    def distillers(self):
        return {'logits': {'type': 'kd_dense.LogitKD'}, 'neck': {'type': 'CWD'}}

    @contextmanager
    def variant(self, distillers, against):
        self.asked.append((distillers, list(against)))
        if 'bad' in distillers:
            raise ConfigError('distillers.bad: is bad')
        _, work = trained()
        yield {'student': work, 'teacher': Work(lambda: None), 'step': work} | dict.fromkeys(against, work)

    def close(self):
        self.closed = True


def test_benchmark_measures_every_variant():
    toy = Toolbox()
    rows = benchmark(toy, [Variant(''), Variant('mine', {'a': {'type': 'NFD'}})], ['student', 'native', 'other'], 1)
    assert [r.variant for r in rows] == ['LogitKD + CWD', 'mine'] and toy.closed
    assert toy.asked[0] == (toy.distillers(), ['native'])  # the student is always there; others it does not have
    assert set(rows[1].parts) == {'student', 'teacher', 'step', 'native'} and rows[1].distillers == {
        'a': {'type': 'NFD'}
    }


def test_benchmark_closes_after_an_error():
    toy = Toolbox()
    with pytest.raises(ConfigError, match='distillers.bad: is bad'):
        benchmark(toy, [Variant('x', {'bad': {}})], iterations=1)
    assert toy.closed


# -- memory ------------------------------------------------------------------------------------------------------------


def test_batch_that_is_too_small_for_batch_norm():
    norm = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))  # as in a pyramid pooling
    with pytest.raises(ConfigError, match='--batch: batch norm needs more than one image here; give --batch 2 or more'):
        measure({'student': Work(lambda: norm(torch.rand(1, 4, 8, 8)).sum())}, CPU, 1)
    with pytest.raises(ValueError, match='another'):  # what is wrong otherwise is not hidden
        measure({'student': Work(_fail)}, CPU, 1)


def _fail() -> None:
    raise ValueError('another')


def test_highest_sum_of_allocations():
    assert highest([]) == 0
    assert highest([-5, 3]) == 0  # what was there before is given back
    assert highest([4, 2, -4, 8, -2, -8]) == 10


def _faults(kept_memory: bool) -> list[int]:
    """Pages that the system has to give for a tensor of 64 MiB, time after time."""
    if kept_memory:
        assert keep_freed_memory()
    found = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * MIB)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the options are those of glibc')
def test_freed_memory_is_taken_again_without_asking_the_system(tmp_path):
    def action():
        pages = 64 * MIB // resource.getpagesize()
        assert min(_faults(False)) >= pages
        # Not the first ones: a fork shares the pages that its parent has freed, and copies them when they are written.
        assert max(_faults(True)[-3:]) < pages // 100

    assert in_a_fork(action, tmp_path / 'log') == 0, (tmp_path / 'log').read_text()


def test_peak_counts_what_is_alive_at_the_same_time():
    def work():
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a
        c = torch.zeros(2000)
        del b, c

    assert peak(work, CPU) == 4 * 2500


def test_peak_counts_what_an_operation_needs_for_a_moment():
    x = torch.zeros(4, 1000)
    assert peak(lambda: x.softmax(1).sum(), CPU) >= 4 * 4000


def test_kept_counts_each_storage_once_and_no_weights():
    """Of ``(w x)^2``: ``x`` for the gradient of ``w``, and ``w x`` for the square; ``w`` is there anyway."""
    model = nn.Linear(300, 100, bias=False)
    x = torch.ones(10, 300)
    work = Work(lambda: model(x).square().sum(), lambda loss: loss.backward(), [model])
    assert kept(work) == 4 * (10 * 300 + 10 * 100)
    assert model.weight.grad is None
    assert kept(Work(lambda: None)) == 0


# -- waits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('operation', 'name'),
    [
        (lambda x: x.sum().item(), '_local_scalar_dense'),
        (lambda x: bool((x > 0).any()), '_local_scalar_dense'),
        (lambda x: x.nonzero(), 'nonzero'),
        (lambda x: x[x > 0.5], 'index'),
        (lambda x: x.masked_select(x > 0.5), 'masked_select'),
        (lambda x: x.long().unique(), '_unique2'),
        (lambda x: x.long().bincount(), 'bincount'),
        (lambda x: x.repeat_interleave(torch.ones_like(x).long()), 'repeat_interleave'),
        (lambda x: x.clone().index_put_((x > 0.5,), x[:1].expand(1)), None),  # one number under a mask
        (lambda x: x.clone().__setitem__(x > 0.5, 1.0), None),
        (lambda x: x[torch.arange(3)], None),
        (lambda x: x * 2 + x.sum(), None),
        (lambda x: x.repeat_interleave(2), None),
    ],
)
def test_waits_are_counted_by_name(operation, name):
    x = torch.tensor([0.2, 0.7, 0.9])
    with Waits(CPU) as waits:
        operation(x)
    assert set(waits.counts) == ({name} if name else set())


def test_waits_in_the_backward_count():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = torch.ones(3, requires_grad=True)
    with Waits(CPU) as waits:
        Reading.apply(x).sum().backward()
    assert dict(waits.counts) == {'_local_scalar_dense': 1}


def test_numbers_of_the_host_do_not_wait_for_a_gpu():
    with Waits(torch.device('cuda')) as waits:
        torch.ones(3).sum().item()
    assert not waits.counts


# -- variants ----------------------------------------------------------------------------------------------------------


def test_variant_reads_what_a_config_would_say():
    variant = read_variant(
        ['both', "neck=dict(type='CWD', taps=['neck:0', 'neck:1'], loss_weight=dict(type='auto', share=0.1))",
         "logits = {'type': 'LogitKD', 'temperature': -2.5, 'a': (1, None, True)}"]
    )  # fmt: skip
    assert variant.name == 'both'
    assert variant.distillers == {
        'neck': dict(type='CWD', taps=['neck:0', 'neck:1'], loss_weight=dict(type='auto', share=0.1)),
        'logits': dict(type='LogitKD', temperature=-2.5, a=(1, None, True)),
    }
    assert title_of(variant.distillers) == 'CWD + LogitKD'


@pytest.mark.parametrize(
    'text', ['neck', 'neck=CWD', 'neck=dict(', "neck=list('CWD')", 'neck=dict(**a)', 'neck=dict(1)', "neck='CWD'",
             "neck=dict(type=open('/etc/passwd').read())", 'neck=dict(type=__import__)', 'neck={**{}}']
)  # fmt: skip
def test_variant_that_is_no_distiller(text):
    with pytest.raises(ConfigError, match='--variant mine: .* is no distiller; write it as in a config'):
        read_variant(['mine', text])


@pytest.mark.parametrize(
    'words', [['mine'], ["neck=dict(type='CWD')"], ["neck = dict(type='CWD')", "a=dict(type='B')"]]
)
def test_variant_without_name_or_distiller(words):
    with pytest.raises(ConfigError, match='--variant: needs a name and distillers'):
        read_variant(words)


# -- what is made up ---------------------------------------------------------------------------------------------------


def test_boxes_lie_inside_and_have_the_sizes_that_are_said():
    boxes = made_up.boxes(2000, (300, 500), torch.Generator().manual_seed(0))
    width, height = (boxes[:, 2] - boxes[:, 0]).numpy(), (boxes[:, 3] - boxes[:, 1]).numpy()
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 300
    side = np.sqrt(width * height)
    assert side.min() >= 0.04 * 300 - 0.01 and side.max() <= 0.6 * 300 + 0.01
    assert np.median(side) == pytest.approx(300 * np.sqrt(0.04 * 0.6), rel=0.1)
    shape = np.maximum(width / height, height / width)
    assert shape.max() <= 2.001 and shape.max() > 1.9


def test_ellipses_fill_their_boxes():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0], [0.0, 0.0, 8.0, 8.0]])
    masks = made_up.ellipses(boxes, (64, 96)).numpy()
    assert masks.shape == (2, 64, 96)
    rows, columns = np.nonzero(masks[0])
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (10, 49, 20, 39)
    assert masks[0].sum() == pytest.approx(np.pi / 4 * 40 * 20, rel=0.02)


def test_label_map_has_regions_of_every_kind():
    labels = made_up.label_map(5, (64, 128), torch.Generator().manual_seed(0))
    assert labels.shape == (64, 128) and set(labels.unique().tolist()) == {0, 1, 2, 3, 4, 255}
    assert all(len(set(labels[8 * i : 8 * i + 8, :16].flatten().tolist())) == 1 for i in range(8))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_table_of_known_measurements():
    header, (cells, other) = table([row(), row('NFD', native=RIVAL)], ['native', 'student'])
    assert header == [
        'config', 'distillers', 'student alone, ms', 'teacher, ms', 'step, ms', 'step / bound', 'step / student alone',
        'native, ms', 'step / native', 'peak memory', 'kept for the backward', 'waits',
    ]  # fmt: skip
    assert cells == [
        'gfl', 'CWD', '16.0 (12.0–20.0)', '4.00 (3.00–5.00)', '21.0 (16.0–28.5)', '1.100 (1.075–1.150)',
        '1.375 (1.344–1.438)', '–', '–', '112.0 MiB (+12.0 MiB)', '81.0 MiB (+1.0 MiB)', '5 (+2)',
    ]  # fmt: skip
    assert other[7:9] == ['36.0 (29.0–39.0)', '0.500 (0.500–0.750)']
    assert len(table([row()])[0]) == 9


def test_markdown_says_what_was_measured():
    text = markdown([row(), row('a|b'), row(config='atss')], MACHINE, ['student'])
    assert 'no GPU; 2 CPU cores, 2 threads; load before the run 0.2; torch 2.12.1' in text
    assert (
        text.count('gfl (mmdet, cpu, fp32): batch of 2, 640 x 672 pixels, made up; SGD, a step after every batch') == 1
    )
    assert 'student 32.0 M parameters, teacher 51.0 M, random weights' in text
    assert 'Teachers with random weights: the time of a forward and of a loss does not depend on' in text
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + 3 and 'a\\|b' in lines[3]
    assert len({line.replace('\\|', '').count('|') for line in lines}) == 1
    trained_ones = Row('gfl', 'CWD', {}, Facts(**{**vars(FACTS), 'random_teacher': False}), row().parts)
    assert 'trained weights' in markdown([trained_ones], MACHINE)
    assert 'Teachers with random' not in markdown([trained_ones], MACHINE)


def test_json_has_every_number(tmp_path):
    rows = [row(native=RIVAL)]
    files = write(rows, MACHINE, tmp_path / 'new', ['native'])
    assert [f.name for f in files] == ['benchmark.md', 'benchmark.json']
    assert files[0].read_text() == markdown(rows, MACHINE, ['native'])
    content = json.loads(files[1].read_text())
    assert content == json.loads(as_json(rows, MACHINE))
    (found,) = content['rows']
    assert content['iterations'] == 3 and content['machine'] == MACHINE
    assert found['parts']['step'] == {
        'seconds': [0.011, 0.021, 0.036],
        'median': 0.021,
        'quartiles': pytest.approx([0.016, 0.0285]),
        'peak_bytes': 112 * MIB,
        'kept_bytes': 81 * MIB,
        'waits': {'nonzero': 3, '_local_scalar_dense': 2},
    }
    assert found['step_over_bound']['median'] == pytest.approx(1.1)
    assert set(found['step_over']) == {'student', 'native'} and found['step_over']['native']['median'] == 0.5
    assert found['facts']['image_size'] == [640, 672] and found['facts']['random_teacher'] is True
    assert found['distillers'] == {'neck': {'type': 'CWD', 'taps': ['neck']}}


def test_clock_measures_seconds():
    work = Work(lambda: time.sleep(0.01))
    assert all(s >= 0.01 for s in measure({'a': work}, CPU, 2)['a'].seconds)
