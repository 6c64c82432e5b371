"""What breaks while a run is going on: losses, disks, signals, a second run in the same folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from kd_dense import DistillationError
from kd_dense.checkpoint import latest
from kd_dense.engine.run import train
from kd_dense.errors import Interrupted, exit_with_sentence
from kd_dense.failures import as_sentences
from kd_dense.registry import HOOKS, LOSSES
from kd_dense.run_lock import locked
from kd_dense.stopping import requested, stop_signals
from tests.helpers.processes import in_a_fork, kill_myself
from tests.helpers.waits import Waits


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob('*.pth'))


def state(path: Path) -> dict:
    return torch.load(path, weights_only=False)['state_dict']


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_distillation_loss_that_is_not_finite(segmentation, tmp_path, monkeypatch, value):
    calls = []

    def loss(s, t, mask=None):
        calls.append(None)
        return (s - t).square().mean() * (value if len(calls) == 4 else 1.0)

    monkeypatch.setitem(LOSSES.module_dict, 'breaks', loss)
    cfg = segmentation(dict(m=dict(type='FeatureMimic', taps='backbone:2', loss='breaks')), iterations=8)
    with pytest.raises(DistillationError) as end:
        train(cfg, str(tmp_path))
    assert str(end.value) == (
        f'loss not finite in iteration 4: kd.m.loss is {value} (look at distillers.m, its loss_weight and the teacher)'
        f'; the last good checkpoint is {tmp_path}/iter_2.pth, from which --resume goes on after the change'
    )
    assert names(tmp_path) == ['iter_2.pth'] and Path(latest(tmp_path)) == tmp_path / 'iter_2.pth'
    assert all(v.isfinite().all() for v in state(tmp_path / 'iter_2.pth').values())


@HOOKS.register_module(force=True)
class RuinForTest(Hook):
    """Makes one weight NaN before or after the training step of iteration ``at``, counted from 1."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after = at, after

    def _ruin(self, runner) -> None:
        if runner.iter + 1 == self.at:
            runner.model.student.decode_head.conv_seg.bias.data[0] = float('nan')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self.after:
            self._ruin(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.after:
            self._ruin(runner)


@pytest.mark.parametrize(
    ('after', 'sentence'),
    [
        (False, 'loss not finite in iteration 4: decode.loss_ce is nan (a loss of the student itself; '),
        (
            True,
            'weights not finite after iteration 4: student.decode_head.conv_seg.bias, so no checkpoint was written; ',
        ),
    ],
)
def test_a_student_that_is_not_finite(segmentation, tmp_path, after, sentence):
    cfg = segmentation(iterations=8)
    cfg.custom_hooks = [dict(type='kd_dense.RuinForTest', at=4, after=after)]
    with pytest.raises(DistillationError) as end:
        train(cfg, str(tmp_path))
    assert str(end.value).startswith(sentence) and str(end.value).count('iter_2.pth') == 1
    assert names(tmp_path) == ['iter_2.pth']


def test_a_student_alone_is_watched_too(segmentation, tmp_path):
    cfg = segmentation(iterations=8)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1e38)
    with pytest.raises(
        DistillationError, match=r'not finite (in|after) iteration [12]\b.*no checkpoint had been written'
    ):
        train(cfg, str(tmp_path), distill=False)
    assert names(tmp_path) == []


def test_watching_asks_the_device_for_nothing():
    from types import SimpleNamespace

    from mmengine.logging import MessageHub

    from kd_dense.engine import FiniteHook

    hub = MessageHub('watching')
    hub.update_scalar('train/loss', 1.0)
    hub.update_scalar('train/kd.m.loss', 1.0)
    outputs = {'loss': torch.ones(()), 'kd.m.loss': torch.ones(())}
    with Waits() as waits:
        FiniteHook().after_train_iter(SimpleNamespace(message_hub=hub, iter=0), 0, None, outputs)
    assert waits.seen == []


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk(segmentation, tmp_path, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if 'iter_4.pth' in os.readlink(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    cfg = segmentation()
    with pytest.raises(DistillationError) as end:
        train(cfg, str(tmp_path))
    assert str(end.value) == (
        f'work_dir: {tmp_path} can not be written, the disk is full; the checkpoints that are there are complete, so '
        'make room and go on with --resume'
    )
    assert names(tmp_path) == ['iter_2.pth'] and not list(tmp_path.glob('.*.tmp'))
    monkeypatch.setattr(os, 'fsync', original)
    train(cfg, str(tmp_path), resume=True)
    assert names(tmp_path) == ['iter_2.pth', 'iter_4.pth']


def test_a_write_that_the_system_refuses(segmentation, tmp_path):
    """A limit of the file size, which the kernel enforces as it does that of a full disk."""

    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        train(segmentation(), str(tmp_path / 'run'))

    assert in_a_fork(action, tmp_path / 'log') == 1
    said = (tmp_path / 'log').read_text()
    assert 'DistillationError: work_dir: ' in said and 'the limit for the size of a file is reached' in said
    assert names(tmp_path / 'run') == [] and not list((tmp_path / 'run').glob('.*.tmp'))


def test_other_errors_are_not_touched(tmp_path):
    with pytest.raises(PermissionError), as_sentences(tmp_path):
        raise PermissionError(errno.EACCES, 'no')
    with pytest.raises(ZeroDivisionError), as_sentences(tmp_path):
        _ = 1 / 0


# -- two runs ----------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(segmentation, tmp_path):
    with locked(tmp_path):
        assert in_a_fork(lambda: train(segmentation(), str(tmp_path)), tmp_path / 'log') == 1
    said = (tmp_path / 'log').read_text()
    assert f'ConfigError: work_dir: {tmp_path} is being written to by process {os.getpid()} on ' in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'log']


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    def action():
        with locked(tmp_path):
            kill_myself()

    assert in_a_fork(action, tmp_path / 'log') == -signal.SIGKILL
    assert json.loads((tmp_path / '.lock').read_text())['host'] == socket.gethostname()
    with locked(tmp_path):
        assert json.loads((tmp_path / '.lock').read_text())['process'] == os.getpid()


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    """Workers of a data loader live on for seconds after a kill."""
    read, write = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent is through
            os._exit(0)
        os.close(read)
    try:
        assert in_a_fork(lambda: locked(tmp_path).__enter__(), tmp_path / 'log') == 0
    finally:
        os.close(write)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ('launcher', 'variable'), [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')]
)
def test_the_processes_of_one_run_share_the_lock(tmp_path, monkeypatch, launcher, variable):
    def enter():
        with locked(tmp_path, launcher):
            pass

    with locked(tmp_path):
        monkeypatch.setenv(variable, '1')
        assert in_a_fork(enter, tmp_path / 'log') == 0
        monkeypatch.setenv(variable, '0')
        assert in_a_fork(enter, tmp_path / 'log') == 1


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.lockf', lockf)
    with locked(tmp_path):
        pass


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_once(number):
    before = signal.getsignal(number)
    with stop_signals():
        assert requested() is None
        os.kill(os.getpid(), number)
        assert requested() == number
        assert signal.getsignal(number) == before  # a second one ends the process at once
    assert requested() is None and signal.getsignal(number) == before


def test_a_signal_that_ended_the_workers(tmp_path):
    with pytest.raises(Interrupted, match='SIGTERM ended the worker') as end, stop_signals(), as_sentences(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError('DataLoader worker (pid(s) 12) exited unexpectedly')
    assert end.value.signal == signal.SIGTERM


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_and_sentence(capsys, number, code):
    @exit_with_sentence
    def main():
        raise Interrupted('SIGINT after iteration 3', number)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    assert capsys.readouterr().err == 'stopped: SIGINT after iteration 3\n'


def test_a_signal_while_the_teacher_is_scored(segmentation, tmp_path, monkeypatch):
    from mmseg.datasets import BaseSegDataset

    original = BaseSegDataset.__getitem__

    def getitem(self, index):
        if self.test_mode or 'val' in str(self.data_prefix):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(BaseSegDataset, '__getitem__', getitem)
    handler, set_handler = signal.getsignal(signal.SIGTERM), signal.signal
    monkeypatch.setattr(signal, 'signal', _keep_first(set_handler))
    try:
        with pytest.raises(Interrupted, match='SIGTERM before training began; start it again'):
            train(segmentation(), str(tmp_path))
    finally:
        set_handler(signal.SIGTERM, handler)
    assert names(tmp_path) == []


def _keep_first(original):
    """``signal.signal`` that leaves a handler in place which a handler would take away: the test sends many signals."""
    return lambda number, handler: original(number, handler) if callable(handler) else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'to', 'code', 'said', 'latest_name'),
    [
        # Ctrl-C in a terminal reaches the workers too, which go on
        (signal.SIGINT, os.killpg, 130, 'nothing is lost: go on from', 'interrupted'),
        (signal.SIGTERM, os.kill, 143, 'nothing is lost: go on from', 'interrupted'),
        # PyTorch ends a worker that is told to end; without a next batch, the last checkpoint is what is left
        (signal.SIGTERM, os.killpg, 143, 'go on from', 'i'),
    ],
)
def test_the_command_ends_with_its_exit_code_and_can_be_resumed(
    segmentation, tmp_path, number, to, code, said, latest_name
):
    """tools/train.py in a process of its own, with a worker that reads the images."""
    import subprocess
    import sys
    import time

    root = Path(__file__).parents[2]
    cfg = segmentation(iterations=2000, interval=1000)
    cfg.default_hooks.checkpoint.update(interval=5, max_keep_ckpts=-1)
    cfg.train_dataloader.num_workers = 1
    cfg.dump(str(tmp_path / 'config.py'))
    command = [sys.executable, '-W', 'ignore', str(root / 'tools' / 'train.py'), 'config.py', '--work-dir', 'run']
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    with (tmp_path / 'err').open('w') as err, (tmp_path / 'out').open('w') as out:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=out, stderr=err, start_new_session=True
        )
        for _ in range(900):
            if 'Iter(train) [   5/2000]' in (tmp_path / 'out').read_text() + (tmp_path / 'err').read_text():
                break
            assert process.poll() is None, (tmp_path / 'err').read_text()[-2000:]
            time.sleep(0.1)
        to(process.pid, number)
        assert process.wait(60) == code, (tmp_path / 'err').read_text()[-2000:]
    last = (tmp_path / 'err').read_text().splitlines()[-1]
    assert last.startswith(f'stopped: {signal.Signals(number).name} ') and said in last
    assert Path(latest(tmp_path / 'run')).name.startswith(latest_name)
    assert torch.load(latest(tmp_path / 'run'), weights_only=False)['meta']['iter'] >= 5
