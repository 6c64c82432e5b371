"""Kills, signals, full disks and bad images in YOLO runs."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from ultralytics import YOLO

import kd_dense.yolo
from kd_dense.errors import ConfigError, DistillationError, Interrupted
from kd_dense.run_lock import locked
from kd_dense.yolo import DistillationTrainer
from tests.helpers.processes import assert_equal, in_a_fork, kill_myself, killed_while_writing
from tests.yolo.helpers import FAST, write_data

SIGKILLED = -signal.SIGKILL
#: Three epochs of four batches; an optimizer step every three batches, so that every epoch ends between two steps.
THREE_EPOCHS = {**FAST, 'epochs': 3, 'batch': 2, 'nbs': 6, 'close_mosaic': 1, 'warmup_epochs': 1}


@pytest.fixture
def config(write_config, student_yaml):
    distillers = {
        'native': {'type': 'Native', 'loss_weight': 'auto'},
        'mimic': {'type': 'FeatureMimic', 'taps': 'neck', 'loss_weight': {'value': 1.0, 'warmup': 0.5}},
    }
    return write_config(student=student_yaml('yolo26'), distillers=distillers, train=THREE_EPOCHS)


def when(event: str, epoch: int, batch: int | None, action):
    """Inside, ``action(trainer)`` is called at ``event`` of that epoch and batch (both counted from 0)."""
    original = DistillationTrainer.run_callbacks

    def run_callbacks(self, name):
        original(self, name)
        if name == event and self.epoch == epoch and batch in (None, self._batch - 1):
            action(self)

    return mock.patch.object(DistillationTrainer, 'run_callbacks', run_callbacks)


def start(config: Path, folder: Path, inside=None, while_writing: str = '') -> int:
    """Train in a process of its own, which leaves its last state in ``end.pth``."""

    def finish(trainer):
        state = {k: v.state_dict() for k, v in (('model', trainer.distillation), ('ema', trainer.ema.ema))}
        torch.save(state | {'optimizer': trainer.optimizer.state_dict()}, folder / 'end.pth')

    def action():
        with contextlib.ExitStack() as stack:
            stack.enter_context(when('on_fit_epoch_end', 2, None, finish))
            stack.enter_context(inside or contextlib.nullcontext())
            stack.enter_context(killed_while_writing(while_writing or 'nothing'))
            kd_dense.yolo.train(config, folder, resume=True)

    return in_a_fork(action, folder.with_suffix('.log'))


def test_killed_twice_and_resumed(config, tmp_path):
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert start(config, whole) == 0, whole.with_suffix('.log').read_text()[-3000:]
    assert start(config, part, inside=when('on_train_batch_end', 1, 1, lambda _: kill_myself())) == SIGKILLED
    assert start(config, part, while_writing='last.pt') == SIGKILLED
    assert [p.name.startswith('.last.pt.') for p in (part / 'weights').glob('.*.tmp')] == [True]
    YOLO(str(part / 'weights' / 'last.pt'))  # of the first epoch
    assert start(config, part) == 0, part.with_suffix('.log').read_text()[-3000:]
    assert not list((part / 'weights').glob('.*.tmp'))
    assert_equal(torch.load(whole / 'end.pth'), torch.load(part / 'end.pth'))
    lines = [(folder / 'results.csv').read_text().splitlines() for folder in (whole, part)]
    without_time = [[[*row.split(',')[:1], *row.split(',')[2:]] for row in rows] for rows in lines]
    assert without_time[0] == without_time[1] and len(lines[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(('epoch', 'batch'), [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 2)])
def test_killed_anywhere(config, tmp_path, epoch, batch):
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert start(config, whole) == 0
    assert start(config, part, inside=when('on_train_batch_end', epoch, batch, lambda _: kill_myself())) == SIGKILLED
    assert start(config, part) == 0
    assert_equal(torch.load(whole / 'end.pth'), torch.load(part / 'end.pth'))


@pytest.mark.parametrize(
    ('epoch', 'left'),
    [
        pytest.param(0, 'no epoch was finished', marks=pytest.mark.slow),
        (1, 'last.pt holds 1 of 3 epochs'),
    ],
)
def test_a_signal_stops_after_the_batch(config, tmp_path, epoch, left):
    def ask(trainer):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with when('on_train_batch_start', epoch, 1, ask), pytest.raises(Interrupted, match=left) as end:
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert end.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / 'run' / 'weights' / 'last.pt').exists() == (epoch > 0)


# -- losses and files --------------------------------------------------------------------------------------------------


def ruin(trainer):
    next(trainer.distillation.distillers.parameters()).data.fill_(float('nan'))


def test_loss_not_finite_in_the_first_epoch(config, tmp_path):
    with when('on_train_batch_start', 0, 2, ruin), pytest.raises(DistillationError) as end:
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert str(end.value).startswith('loss not finite in epoch 1: ') and 'is nan' in str(end.value)
    assert 'no checkpoint had been written' in str(end.value)
    assert not (tmp_path / 'run' / 'weights' / 'last.pt').exists()


@pytest.mark.slow
def test_loss_that_stays_not_finite(config, tmp_path):
    """Ultralytics goes back to the last good checkpoint and tries again; after the third time the run stops."""
    with when('on_train_batch_start', 1, 2, ruin), pytest.raises(DistillationError, match='in every attempt') as end:
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert 'mimic is nan' in str(end.value) and 'the last good checkpoint is' in str(end.value)
    for value in YOLO(str(tmp_path / 'run' / 'weights' / 'last.pt')).model.state_dict().values():
        assert torch.isfinite(value).all()


def test_weights_not_finite_are_not_written(config, tmp_path):
    """The last step of an epoch ruined them, so that no loss has shown it yet."""
    before = []

    def remember(trainer):
        before.append(trainer.last.read_bytes())

    with (
        when('on_model_save', 0, None, remember),
        when('on_fit_epoch_end', 1, None, lambda t: pytest.fail('was saved')),
        when('on_train_epoch_end', 1, None, ruin),
        pytest.raises(DistillationError, match='weights not finite after epoch 2: distillers'),
    ):
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert (tmp_path / 'run' / 'weights' / 'last.pt').read_bytes() == before[0]


def test_a_full_disk(config, tmp_path, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if '.last.pt.' in os.readlink(f'/proc/self/fd/{descriptor}') and (tmp_path / 'run/weights/last.pt').exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(DistillationError, match='work_dir: .* can not be written, the disk is full'):
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert sorted(p.name for p in (tmp_path / 'run' / 'weights').iterdir()) == ['best.pt', 'last.pt']


def test_two_runs_in_one_folder(config, tmp_path):
    with locked(tmp_path / 'run'):
        code = in_a_fork(lambda: kd_dense.yolo.train(config, tmp_path / 'run'), tmp_path / 'log')
    assert code == 1
    assert f'is being written to by process {os.getpid()} on ' in (tmp_path / 'log').read_text()
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['.lock']


def no_images(folder: Path) -> None:
    for path in (folder / 'images' / 'train').iterdir():
        path.unlink()


def no_labels(folder: Path) -> None:
    shutil.rmtree(folder / 'labels' / 'train')


def all_broken(folder: Path) -> None:
    for path in (folder / 'images' / 'train').iterdir():
        path.write_bytes(b'no image')


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (no_images, r'data: there are no images in .*images/train; put them there'),
        (no_labels, r'data: no image has a label file in .*labels/train; put the labels there'),
        (all_broken, r'data: none of the images can be used: .*train0\.png'),
    ],
)
def test_data_sets_without_images(write_config, tmp_path, damage, sentence):
    damage(write_data(tmp_path / 'data').parent)
    with pytest.raises(ConfigError, match=sentence):
        kd_dense.yolo.train(write_config(data=str(tmp_path / 'data' / 'data.yaml')), tmp_path / 'run')


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_vanishes_while_training(write_config, tmp_path, workers):
    data = write_data(tmp_path / 'data')
    config = write_config(data=str(data), train={**FAST, 'workers': workers, 'epochs': 3, 'mosaic': 0.0})
    image = tmp_path / 'data' / 'images' / 'train' / 'train3.png'
    with (
        mock.patch.object(DistillationTrainer, '_model_train', _then(DistillationTrainer._model_train, image.unlink)),
        pytest.raises(ConfigError, match=r'data: the image .*train3\.png is missing or can not be decoded'),
    ):
        kd_dense.yolo.train(config, tmp_path / 'run')


def _then(function, action):
    """``function``, after whose first call ``action`` is called."""
    done = []

    def both(*args):
        function(*args)
        if not done:
            done.append(action())

    return both


# -- what has to work --------------------------------------------------------------------------------------------------


def test_one_broken_image_is_left_out(write_config, tmp_path):
    data = write_data(tmp_path / 'data')
    (tmp_path / 'data/images/train/train3.png').write_bytes(b'no image')
    record = kd_dense.yolo.train(write_config(data=str(data)), tmp_path / 'run')
    assert record.iterations == 2  # seven images are left for batches of four


def test_images_without_objects_and_batches_of_one(write_config, tmp_path):
    data = write_data(tmp_path / 'data')
    for i in range(1, 8):
        (tmp_path / 'data' / 'labels' / 'train' / f'train{i}.txt').unlink()
    distillers = {n: {'type': n} for n in ('Native', 'LogitKD')} | {'CWD': {'type': 'CWD', 'taps': 'neck'}}
    config = write_config(data=str(data), distillers=distillers, train={**FAST, 'batch': 1})
    kd_dense.yolo.train(config, tmp_path / 'run')
    for value in YOLO(str(tmp_path / 'run' / 'weights' / 'last.pt')).model.state_dict().values():
        assert torch.isfinite(value).all()
