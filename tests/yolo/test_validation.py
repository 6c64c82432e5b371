"""No score depends on how long the non-maximum suppression takes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from ultralytics.utils import nms

import kd_dense.yolo
from kd_dense.yolo.validation import no_time_limit


@pytest.fixture
def slow_machine(monkeypatch):
    """Every look at the clock of the non-maximum suppression is an hour after the one before."""
    clock = itertools.count(step=3600)
    monkeypatch.setattr(nms, 'time', SimpleNamespace(time=lambda: next(clock)))


def test_every_image_keeps_its_boxes(slow_machine):
    # [images, 4 box numbers and 2 scores, anchors]: one sure box in each of three images
    raw = torch.tensor([10.0, 10.0, 8.0, 8.0, 0.9, 0.1])[None, :, None].repeat(3, 1, 1)
    assert [len(found) for found in nms.non_max_suppression(raw)] == [1, 0, 0]  # what the limit does
    with no_time_limit():
        assert [len(found) for found in nms.non_max_suppression(raw)] == [1, 1, 1]
    assert [len(found) for found in nms.non_max_suppression(raw)] == [1, 0, 0]  # and it is put back


@pytest.mark.parametrize('distill', [True, False])
def test_training_and_evaluation_are_not_cut_short(distill, write_config, tmp_path, slow_machine, monkeypatch):
    exceeded = []
    monkeypatch.setattr(nms, 'LOGGER', SimpleNamespace(warning=exceeded.append))
    suppressed = []
    original = nms.non_max_suppression
    monkeypatch.setattr(nms, 'non_max_suppression', lambda *a, **k: suppressed.append(1) or original(*a, **k))
    config = write_config()
    record = kd_dense.yolo.train(config, tmp_path / 'run', distill=distill)
    in_training = len(suppressed)
    kd_dense.yolo.evaluate(config, record.checkpoint, tmp_path / 'eval')
    assert in_training and len(suppressed) > in_training
    assert not exceeded


def test_evaluation_uses_the_thresholds_of_the_training(write_config, teacher_file, tmp_path, monkeypatch):
    seen = []
    original = nms.non_max_suppression
    monkeypatch.setattr(nms, 'non_max_suppression', lambda *a, **k: seen.append(a[1:3]) or original(*a, **k))
    config = write_config(train={'imgsz': 64, 'workers': 0, 'device': 'cpu', 'conf': 0.2, 'iou': 0.4})
    kd_dense.yolo.evaluate(config, teacher_file(), tmp_path / 'eval')
    assert set(seen) == {(0.2, 0.4)}
