"""A run that is killed and resumed ends like one that was not, bit for bit; and so does one that a signal stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from kd_dense import DISTILLERS, Distiller
from kd_dense.checkpoint import latest
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.distillers import TapPair
from kd_dense.engine.run import train
from kd_dense.registry import HOOKS
from tests.helpers import tiny
from tests.helpers.processes import assert_equal, in_a_fork, kill_myself, killed_while_writing

SIGKILLED = -signal.SIGKILL


@DISTILLERS.register_module(force=True)
class QueueForTest(Distiller):
    """Pulls the student towards a running mean that it keeps in a buffer, as prototypes and queues are kept."""

    def __init__(self, taps: str) -> None:
        super().__init__()
        self.taps = {'features': TapPair.parse(taps)}
        self.register_buffer('mean', torch.zeros(()))
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))

    def forward(self, student, teacher, context):
        s, t = student['features'][0].mean(), teacher['features'][0].mean()
        self.mean.lerp_(t, 0.3)
        self.seen += 1
        # noise: torch's random state has to be right too
        return {'loss': (s - self.mean - 0.01 * torch.randn(()) + self.seen).square()}


@HOOKS.register_module(force=True)
class HookForTest(Hook):
    """Sends a signal to its own process in the middle of the loop of iteration ``at``, counted from 1."""

    priority = 'NORMAL'

    def __init__(self, at: int, number: int = signal.SIGKILL, in_validation: bool = False) -> None:
        self.at, self.number, self.in_validation = at, number, in_validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self.in_validation and runner.iter + 1 == self.at:
            os.kill(os.getpid(), self.number)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.in_validation and runner.iter == self.at:
            os.kill(os.getpid(), self.number)


DISTILLERS_OF_TEST = dict(
    logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.1)),
    mimic=dict(type='FeatureMimic', loss_weight=dict(value=2.0, warmup=0.5)),
    late=dict(type='NFD', loss_weight=dict(type='auto', start=0.6)),
    queue=dict(type='QueueForTest'),
)


def distillers(tap: str) -> dict:
    return {k: dict(v) if k == 'logits' else dict(v, taps=tap) for k, v in DISTILLERS_OF_TEST.items()}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


@pytest.fixture(scope='module')
def segmentation(scenes, tmp_path_factory) -> Config:
    """Eight iterations; a checkpoint every two, a validation every four; gradients of three iterations accumulated."""
    config = tiny.segmentor(8)
    file = tiny.saved(config, tmp_path_factory.mktemp('teacher') / 'teacher.pth', CLASSES)
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=dict(config=config, checkpoint=file),
        distillers=distillers('backbone:2'),
    )
    cfg = tiny.segmentation_run(model, scenes, iterations=8, interval=2)
    cfg.train_cfg.val_interval = 4
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    cfg.optim_wrapper.accumulative_counts = 3
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.2, update_buffers=True)]
    return cfg


@pytest.fixture(scope='module')
def detection(scenes, tmp_path_factory) -> Config:
    """Three epochs of four iterations, a checkpoint and a validation after each."""
    config = tiny.detector('GFL', 8)
    file = tiny.saved(config, tmp_path_factory.mktemp('teacher') / 'teacher.pth', CLASSES[1:])
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.detector('GFL', 4),
        teacher=dict(config=config, checkpoint=file),
        distillers=distillers('neck:0'),
    )
    cfg = tiny.detection_run(model, scenes, epochs=3)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.2)]
    return cfg


def start(cfg: Config, work_dir: Path, kill: dict | None = None, while_writing: str = '', resume: bool = True) -> int:
    """Train in a process of its own; see :class:`HookForTest` for ``kill``. The exit status of the process."""
    cfg = Config(cfg.to_dict())
    if kill:
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='kd_dense.HookForTest', **kill)]

    def action() -> None:
        with killed_while_writing(while_writing or 'nothing'):
            train(cfg, str(work_dir), seed=5, resume=resume)

    return in_a_fork(action, work_dir.with_suffix('.log'))


def content(path: Path) -> dict:
    """What has to be the same: everything but times, paths and log buffers."""
    whole = torch.load(path, weights_only=False, map_location='cpu')
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'kd_dense', 'kd_dense_random_state')
    return {k: whole[k] for k in keys if k in whole} | {'iter': whole['meta']['iter'], 'epoch': whole['meta']['epoch']}


@pytest.fixture(scope='module')
def whole_segmentation(segmentation, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert start(segmentation, folder) == 0, folder.with_suffix('.log').read_text()[-2000:]
    return folder


@pytest.fixture(scope='module')
def whole_detection(detection, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert start(detection, folder) == 0, folder.with_suffix('.log').read_text()[-2000:]
    return folder


def assert_same_end(a: Path, b: Path, name: str) -> None:
    first, second = content(a / name), content(b / name)
    assert set(first) >= {'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'kd_dense'}
    assert_equal(first, second)
    assert (a / 'curve.json').read_text() == (b / 'curve.json').read_text()


# -- MMSegmentation: iteration-based -----------------------------------------------------------------------------------


def test_segmentation__killed_three_times(segmentation, whole_segmentation, tmp_path):
    work = tmp_path / 'run'
    # goes on from iter_4.pth, which was written a second time when a validation had found a best score
    assert start(segmentation, work, kill=dict(at=6)) == SIGKILLED
    assert start(segmentation, work, while_writing='iter_6.pth') == SIGKILLED
    # half of the file is there, under a name of its own; the checkpoint before it is whole and the one to go on from
    assert [p.name.startswith('.iter_6.pth.') for p in work.glob('.*.tmp')] == [True]
    assert not (work / 'iter_6.pth').exists() and Path(latest(work)).name == 'iter_4.pth'
    assert start(segmentation, work, kill=dict(at=7)) == SIGKILLED
    assert not list(work.glob('.*.tmp'))
    assert start(segmentation, work) == 0, work.with_suffix('.log').read_text()[-2000:]
    assert_same_end(whole_segmentation, work, 'iter_8.pth')


@pytest.mark.parametrize(('at', 'in_validation'), [(5, False), (4, True)])
def test_segmentation__sigterm_saves_and_stops(segmentation, whole_segmentation, tmp_path, at, in_validation):
    work = tmp_path / 'run'
    assert start(segmentation, work, kill=dict(at=at, number=signal.SIGTERM, in_validation=in_validation)) == 1
    assert f'Interrupted: SIGTERM after iteration {at} of 8; nothing is lost' in work.with_suffix('.log').read_text()
    assert Path(latest(work)).name == 'interrupted.pth'
    assert torch.load(work / 'interrupted.pth', weights_only=False)['meta']['iter'] == at
    assert start(segmentation, work) == 0
    if in_validation:  # which was broken off, and is not begun again
        assert_equal(content(whole_segmentation / 'iter_8.pth'), content(work / 'iter_8.pth'))
    else:
        assert_same_end(whole_segmentation, work, 'iter_8.pth')
    assert not (work / 'interrupted.pth').exists()


# -- MMDetection: epoch-based ------------------------------------------------------------------------------------------


def test_detection__killed_and_stopped_in_the_middle_of_epochs(detection, whole_detection, tmp_path):
    work = tmp_path / 'run'
    assert start(detection, work, kill=dict(at=6)) == SIGKILLED
    assert Path(latest(work)).name == 'epoch_1.pth'
    assert start(detection, work, kill=dict(at=7, number=signal.SIGINT)) == 1
    assert 'Interrupted: SIGINT after iteration 7 of 12; nothing is lost' in work.with_suffix('.log').read_text()
    assert Path(latest(work)).name == 'interrupted.pth'
    assert start(detection, work, while_writing='epoch_3.pth') == SIGKILLED
    assert Path(latest(work)).name == 'epoch_2.pth'
    assert start(detection, work) == 0, work.with_suffix('.log').read_text()[-2000:]
    assert_same_end(whole_detection, work, 'epoch_3.pth')


# -- more of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_segmentation__with_worker_processes(segmentation, tmp_path):
    """Iteration-based: the workers read all batches again, and so draw what they drew."""
    cfg = Config(segmentation.to_dict())
    cfg.train_dataloader.update(num_workers=2, persistent_workers=True)
    assert start(cfg, tmp_path / 'whole') == 0
    assert start(cfg, tmp_path / 'part', kill=dict(at=5)) == SIGKILLED
    assert start(cfg, tmp_path / 'part') == 0
    assert_same_end(tmp_path / 'whole', tmp_path / 'part', 'iter_8.pth')


@pytest.mark.slow
def test_detection__with_worker_processes(detection, tmp_path):
    """Epoch-based: new workers for each epoch draw alike; those that are kept alive would have to be kept on a disk."""
    cfg = Config(detection.to_dict())
    cfg.train_dataloader.update(num_workers=2, persistent_workers=False)
    assert start(cfg, tmp_path / 'whole') == 0
    assert start(cfg, tmp_path / 'part', kill=dict(at=6)) == SIGKILLED
    assert start(cfg, tmp_path / 'part') == 0
    assert_same_end(tmp_path / 'whole', tmp_path / 'part', 'epoch_3.pth')


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('toolbox', ['segmentation', 'detection'])
def test_random_kills(request, toolbox, seed, tmp_path):
    """Killed in random iterations and writes, eight times at most; what is left is resumed to the end."""
    cfg = request.getfixturevalue(toolbox)
    whole = request.getfixturevalue(f'whole_{toolbox}')
    count, name = (8, 'iter_{}.pth') if toolbox == 'segmentation' else (12, 'epoch_{}.pth')
    draw = random.Random(seed)
    work = tmp_path / 'run'
    kills = 0
    for _ in range(8):
        if draw.random() < 0.3:
            step = draw.randrange(2, 9, 2) if toolbox == 'segmentation' else draw.randint(1, 3)
            status = start(cfg, work, while_writing=name.format(step))
        else:
            status = start(cfg, work, kill=dict(at=draw.randint(1, count)))
        if status == 0:
            break
        assert status == SIGKILLED, work.with_suffix('.log').read_text()[-2000:]
        kills += 1
    assert kills
    if status:
        assert start(cfg, work) == 0
    last = name.format(8 if toolbox == 'segmentation' else 3)
    assert_equal(content(whole / last), content(work / last))


def test_only_one_checkpoint_is_kept__and_a_kill_leaves_it(segmentation, tmp_path):
    """MMEngine would have removed the old one before writing the new one."""
    cfg = Config(segmentation.to_dict())
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best=None)
    work = tmp_path / 'run'
    assert start(cfg, work, while_writing='iter_4.pth') == SIGKILLED
    assert [p.name for p in work.glob('*.pth')] == ['iter_2.pth']
    assert start(cfg, work, kill=dict(at=5)) == SIGKILLED
    assert [p.name for p in work.glob('*.pth')] == ['iter_4.pth']


def test_latest__survives_a_cut_pointer_and_a_move(tmp_path):
    work = tmp_path / 'a'
    work.mkdir()
    assert latest(work) is None
    for i, name in enumerate(['iter_2.pth', 'iter_10.pth', 'best_mIoU_iter_10.pth']):
        (work / name).write_bytes(b'x')
        os.utime(work / name, (i, i))
    (work / 'last_checkpoint').write_text('')  # killed between truncating and writing
    assert latest(work) == str(work / 'iter_10.pth')
    (work / 'last_checkpoint').write_text(str(work / 'iter_2.pth'))
    assert latest(work) == str(work / 'iter_2.pth')
    shutil.move(work, tmp_path / 'b')
    assert latest(tmp_path / 'b') == str(tmp_path / 'b' / 'iter_2.pth')


def test_kill_myself_is_a_real_sigkill(tmp_path):
    assert in_a_fork(kill_myself, tmp_path / 'log') == SIGKILLED
