"""What MMEngine logs is the same, and nothing of it is read between two log lines."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from kd_dense import DistillationError
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine import DeferredLogHook, FiniteHook, companions, run
from kd_dense.engine.deferred_log import LIMIT, DeferredBuffer, DeferredLog, defer_log
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.tools.conftest import forget_runs, scalars

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
INTERVAL = 3  # of the log lines


@pytest.fixture(autouse=True)
def _runs_are_apart() -> None:
    forget_runs()


def steps(count: int) -> list[dict[str, torch.Tensor]]:
    """Values of every type, one of which comes in every other step only."""
    values = torch.randn(count, len(TYPES)) * 100
    made = [{str(t): row[i].to(t) for i, t in enumerate(TYPES)} for row in values]
    return [one | ({'sometimes': one[str(torch.float32)] * 2} if i % 2 else {}) for i, one in enumerate(made)]


def logged(hub: MessageHub) -> dict[str, tuple]:
    """Key -> numbers, their type, and counts."""
    return {
        key: (buffer.data[0].tolist(), buffer.data[0].dtype, buffer.data[1].tolist())
        for key, buffer in hub.log_scalars.items()
    }


# -- the log -----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_message_hub():
    stock, ours, log = MessageHub('stock'), MessageHub('ours'), DeferredLog()
    for values in steps(7):
        for key, value in values.items():
            stock.update_scalar(key, value)
        log.add(ours, values)
    assert len(log) > 0 and list(ours.log_scalars) == list(stock.log_scalars)
    assert logged(ours) == logged(stock) and len(log) == 0
    assert logged(ours)['sometimes'][1] == np.float64 and logged(ours)['torch.int64'][1] == np.int64


def test_nothing_is_read_before_somebody_asks_and_then_all_at_once():
    hub, log = MessageHub('asks'), DeferredLog()
    first, *others = [{k: v for k, v in one.items() if v.dtype == torch.float32} for one in steps(9)]
    log.add(hub, first | {'sometimes': torch.zeros(())})
    with Operations() as operations:
        for values in others:
            log.add(hub, values)
        assert hub.log_scalars['sometimes'].waits and len(hub.log_scalars) == 2
        assert operations.seen == [] and operations.counts['stack'] == 8
        hub.log_scalars['sometimes'].mean(2)
        hub.log_scalars[str(torch.float32)].current()
    assert operations.seen == ['tolist'] and not hub.log_scalars['sometimes'].waits


@pytest.mark.parametrize(
    'read',
    [
        lambda b: b.mean(2),
        lambda b: b.min(),
        lambda b: b.max(3),
        lambda b: b.current(),
        lambda b: b.statistics('mean', 3),
        lambda b: b.data[0].tolist(),
        lambda b: copy.deepcopy(b).data[1].tolist(),
    ],
)
def test_whatever_is_read_is_complete(read):
    stock, ours, log = MessageHub('stock'), MessageHub('ours'), DeferredLog()
    for values in steps(4):
        stock.update_scalar('x', values['torch.float32'])
        log.add(ours, {'x': values['torch.float32']})
    assert ours.log_scalars['x'].waits
    assert read(ours.log_scalars['x']) == read(stock.log_scalars['x'])


def test_a_number_of_somebody_else_keeps_its_place():
    hub, log = MessageHub('else'), DeferredLog()
    for number in (1.0, 2.0, 3.0):
        log.add(hub, {'x': torch.tensor(number)})
    hub.update_scalar('x', 4.0)
    log.add(hub, {'x': 5.0, 'y': np.float32(6)})
    log.add(hub, {'x': torch.tensor([7.0])})
    assert hub.get_scalar('x').data[0].tolist() == [1, 2, 3, 4, 5, 7]
    assert type(hub.get_scalar('y')) is HistoryBuffer


def test_values_are_kept_although_their_memory_is_used_again():
    hub, log, loss = MessageHub('memory'), DeferredLog(), torch.zeros((), requires_grad=True)
    for _ in range(4):
        log.add(hub, {'x': loss})
        loss.data.add_(1)
    assert hub.get_scalar('x').data[0].tolist() == [0, 1, 2, 3]


def test_copies_and_pickles_are_of_mmengine_alone():
    hub, log = MessageHub('copies'), DeferredLog()
    for values in steps(3):
        log.add(hub, values)
    buffer = hub.get_scalar('torch.float32')
    saved = hub.state_dict()['log_scalars']['torch.float32']
    for copied in (saved, copy.copy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert type(copied) is HistoryBuffer and 'log' not in vars(copied)
        assert copied.data[0].tolist() == buffer.data[0].tolist() and copied.max_length == buffer.max_length
    assert type(buffer) is DeferredBuffer and b'kd_dense' not in pickle.dumps(buffer)


def test_rows_that_nobody_reads_do_not_pile_up():
    hub, log = MessageHub('pile'), DeferredLog()
    for i in range(2 * LIMIT + 3):
        log.add(hub, {'x': torch.tensor(float(i))})
        assert len(log) < LIMIT
    assert hub.get_scalar('x').data[0].tolist() == list(range(2 * LIMIT + 3))


def test_several_numbers_are_refused_as_by_mmengine():
    hub, log = MessageHub('several'), DeferredLog()
    log.add(hub, {'x': torch.zeros(())})
    with pytest.raises(AssertionError):
        log.add(hub, {'x': torch.zeros(2)})


def test_a_hook_of_another_class_stays():
    class Own(RuntimeInfoHook):
        pass

    stock, own = RuntimeInfoHook(), Own()
    stock.last_loop_stage, stock.priority = 'train', 'HIGH'
    runner = SimpleNamespace(hooks=[own, stock])
    defer_log(runner)
    defer_log(runner)
    assert runner.hooks[0] is own and type(runner.hooks[1]) is DeferredLogHook
    assert (runner.hooks[1].last_loop_stage, runner.hooks[1].priority) == ('train', 'HIGH')


# -- the hook that looks for losses that are not finite ----------------------------------------------------------------


def test_losses_are_looked_at_when_they_are_there_and_the_first_one_is_named(tmp_path):
    hub, hook, finite = MessageHub('finite'), DeferredLogHook(), FiniteHook()
    runner = SimpleNamespace(message_hub=hub, iter=0, work_dir=str(tmp_path))
    losses = [1.0, 2.0, float('inf'), float('nan')]
    for runner.iter, number in enumerate(losses):
        outputs = {'loss': torch.tensor(number), 'kd.m.loss': torch.tensor(number), 'decode.loss': torch.ones(())}
        hook.after_train_iter(runner, 0, None, outputs)
        finite.after_train_iter(runner, 0, None, outputs)
    with pytest.raises(DistillationError, match=r'not finite in iteration 3: kd\.m\.loss is inf \(look at distillers'):
        finite.before_val(runner)


# -- trainings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


def segmentation(data: Path) -> tuple[Config, str, set[int], set[int]]:
    """Eight iterations of a distilled segmentor, an update every two.

    Returns:
        The config; the checkpoint to resume from, which lies between two log lines; iterations in which more is read:
        when the distiller begins, and for checkpoints; iterations with a log line.
    """
    teacher = tiny.segmentor(8)
    path = tiny.saved(teacher, data.parent / 'segmentor.pth', CLASSES)
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=dict(config=teacher, checkpoint=path),
        distillers=dict(nfd=dict(type='NFD', taps='backbone:2', loss_weight=dict(value=2.0, start=0.3))),
    )
    cfg = tiny.segmentation_run(model, data, iterations=8, interval=5)
    cfg.custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=False)]
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    return cfg, 'iter_5.pth', {4, 5, 8}, {3, 6}


def detection(data: Path) -> tuple[Config, str, set[int], set[int]]:
    """Two epochs of four iterations of a detector alone; the same."""
    cfg = tiny.detection_run(tiny.detector('GFL'), data)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    return cfg, 'epoch_1.pth', set(), {3, 7}


@contextmanager
def watched() -> Iterator[dict[str, dict[int, list[str]]]]:
    """``hooks`` after and ``clip`` inside of an iteration -> iteration -> reads."""
    found: dict[str, dict[int, list[str]]] = {'hooks': {}, 'clip': {}}
    call, clip = Runner.call_hook, OptimWrapper._clip_grad

    def call_hook(runner: Runner, name: str, **arguments) -> None:
        if name != 'after_train_iter':
            return call(runner, name, **arguments)
        with Operations() as operations:
            call(runner, name, **arguments)
        found['hooks'][runner.iter + 1] = operations.seen

    def clip_grad(wrapper: OptimWrapper) -> None:
        with Operations() as operations:
            clip(wrapper)
        found['clip'][len(found['clip']) + 1] = operations.seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, 'call_hook', call_hook)
        patch.setattr(OptimWrapper, '_clip_grad', clip_grad)
        yield found


def trained(cfg: Config, work_dir: Path, **arguments) -> dict[str, dict[int, list[str]]]:
    forget_runs()
    with watched() as found:
        run.train(cfg, str(work_dir), seed=1, **arguments)
    return found


def lines(work_dir: Path) -> list[list[tuple]]:
    """Names and numbers of each log line, in their order, without times."""
    return [[pair for pair in line.items() if 'time' not in pair[0]] for line in scalars(work_dir)]


def in_checkpoint(path: Path) -> dict[str, list]:
    found = torch.load(path, weights_only=False)['message_hub']['log_scalars']
    assert {type(buffer) for buffer in found.values()} == {HistoryBuffer}
    return {key: buffer.data[0].tolist() for key, buffer in found.items() if 'time' not in key}


@pytest.mark.parametrize('kind', [segmentation, detection])
def test_a_training_logs_what_it_did_and_reads_it_at_log_lines(kind, data, tmp_path, monkeypatch):
    cfg, middle, busy, lines_at = kind(data)
    cfg.default_hooks.logger.interval = INTERVAL
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.01),
        clip_grad=dict(max_norm=35),
        accumulative_counts=2 if kind is segmentation else 1,
    )
    ours = trained(cfg, tmp_path / 'ours')
    resumed = trained(cfg, tmp_path / 'resumed', resume=str(tmp_path / 'ours' / middle))
    with monkeypatch.context() as patch:
        for place in (run, companions):
            patch.setattr(place, 'defer_log', lambda runner: None)
        stock = trained(cfg, tmp_path / 'stock')

    assert lines(tmp_path / 'ours') == lines(tmp_path / 'stock') and len(lines(tmp_path / 'ours')) == 2
    last = sorted(p.name for p in (tmp_path / 'ours').glob('*.pth'))[-1]
    for name in (middle, last):
        assert in_checkpoint(tmp_path / 'ours' / name) == in_checkpoint(tmp_path / 'stock' / name)
    assert in_checkpoint(tmp_path / 'resumed' / last) == in_checkpoint(tmp_path / 'stock' / last)
    assert lines(tmp_path / 'resumed')[-1] == lines(tmp_path / 'ours')[-1]

    # MMEngine's own hook reads every loss in every iteration, its optimizer wrapper every norm
    assert all(seen.count('_local_scalar_dense') >= 2 for seen in stock['hooks'].values())
    assert all('_local_scalar_dense' in seen for seen in stock['clip'].values())
    for found in (ours, resumed):
        begun = min(found['hooks'])
        for iteration, seen in found['hooks'].items():
            if iteration not in busy | {begun}:
                assert seen == (['tolist'] if iteration in lines_at else []), iteration
        assert sum(map(len, found['clip'].values())) <= 1  # the first norm
