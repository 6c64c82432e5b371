"""What is written: a plain student that needs no kd_dense, and everything that a resumed run needs."""

import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load

import kd_dense.yolo
from kd_dense.errors import ConfigError
from kd_dense.yolo import DistillationTrainer
from tests.yolo.helpers import FAST

PLAIN = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('kd_dense', 'mmengine', 'mmcv'):
            raise ModuleNotFoundError(f'{name} is not installed here')
sys.meta_path.insert(0, Absent())
import numpy as np, torch
from ultralytics import YOLO
results = {}
for path in sys.argv[1:]:
    model = YOLO(path)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    boxes = model.predict(image, imgsz=64, conf=0.0, max_det=20, verbose=False, device='cpu')[0].boxes.data
    results[path] = boxes.tolist()
print(json.dumps(results))
"""


class Interrupted(Exception):
    """Stands for a kill signal."""


def run(config, folder, student, data, stop_before=None, **arguments):
    """Train; ``stop_before``: the epoch at whose start the run is interrupted. The trainer, whether or not it ended."""
    overrides = {**FAST, 'model': student, 'data': str(data), 'distill_model': str(config)}
    overrides.update(project=str(folder.parent), name=folder.name, exist_ok=True, **arguments)
    trainer = DistillationTrainer(overrides=overrides)

    def interrupt(trainer):
        if trainer.epoch == stop_before:
            raise Interrupted

    trainer.add_callback('on_train_epoch_start', interrupt)
    try:
        trainer.train()
    except Interrupted:
        assert stop_before is not None
    return trainer


def names_in(path):
    """Every class or function that the pickle in ``path`` names."""
    found = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(f'{module}.{name}')
            return super().find_class(module, name)

    module = types.SimpleNamespace(Unpickler=Recorder, load=pickle.load, __name__='recorder')
    torch.load(path, map_location='cpu', pickle_module=module, weights_only=False)
    return found


def test_every_checkpoint_is_a_plain_student(write_config, student_yaml, data, tmp_path):
    student = student_yaml('yolo26')
    running = run(write_config(), tmp_path / 'a', student, data, stop_before=2, epochs=3, save_period=1).wdir
    finished = run(write_config(), tmp_path / 'b', student, data).wdir
    paths = [running / n for n in ('last.pt', 'best.pt', 'epoch0.pt', 'epoch1.pt')] + [
        finished / n for n in ('last.pt', 'best.pt')
    ]
    assert sorted(p.name for p in running.iterdir()) == sorted(p.name for p in paths[:4])
    assert sorted(p.name for p in finished.iterdir()) == ['best.pt', 'last.pt']
    for path in paths:
        names = names_in(path)
        assert 'ultralytics.nn.tasks.DetectionModel' in names
        assert not [n for n in names if n.startswith(('kd_dense', 'mmengine')) or 'distill' in n], path
        torch_safe_load(str(path), safe_only=True)  # nothing but tensors, containers and Ultralytics' own classes
    # Loaded, and predicting the same, where kd_dense can not be imported.
    text = subprocess.run(
        [sys.executable, '-c', PLAIN, *map(str, paths)], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    results = json.loads(text.splitlines()[-1])
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for path in paths:
        boxes = (
            YOLO(str(path)).predict(image, imgsz=64, conf=0.0, max_det=20, verbose=False, device='cpu')[0].boxes.data
        )
        torch.testing.assert_close(torch.tensor(results[str(path)]), boxes)
    # A finished run leaves no state behind: the file is as small as the student.
    size = sum(p.numel() for p in YOLO(str(paths[-1])).model.parameters())
    assert paths[-1].stat().st_size < 2 * size + 800_000


def test_last_checkpoint_holds_the_moving_average_of_the_student(write_config, student_yaml, data, tmp_path):
    trainer = run(write_config(), tmp_path / 'run', student_yaml(), data, stop_before=1, epochs=2)
    model, checkpoint = load_checkpoint(trainer.last)
    for name, value in trainer.ema.ema.student_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    state = checkpoint['kd_dense']
    assert {name.split('.')[0] for name in state['distillers']} == {'methods', 'weights'}
    for name, value in trainer.distillation.distillers.state_dict().items():
        assert torch.equal(state['distillers'][name], value), name


@pytest.mark.parametrize(
    'close_mosaic', [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(close_mosaic, write_config, student_yaml, data, tmp_path):
    config = write_config(distillers={'native': {'type': 'Native', 'loss_weight': 'auto'}})
    arguments = {'epochs': 3, 'close_mosaic': close_mosaic, 'warmup_epochs': 1}
    whole = run(config, tmp_path / 'whole', student_yaml('yolo26'), data, **arguments)
    run(config, tmp_path / 'part', student_yaml('yolo26'), data, stop_before=2, **arguments)
    resumed = run(
        config, tmp_path / 'part', student_yaml('yolo26'), data, resume=str(tmp_path / 'part' / 'weights' / 'last.pt')
    )
    assert resumed.start_epoch == 2
    for part in ('student_model', 'distillers'):
        wanted = getattr(whole.distillation, part).state_dict()
        for name, value in getattr(resumed.distillation, part).state_dict().items():
            assert torch.equal(value, wanted[name]), f'{part}.{name}'
    wanted = whole.ema.ema.state_dict()
    for name, value in resumed.ema.ema.state_dict().items():
        assert torch.equal(value, wanted[name]), f'moving average of {name}'
    lines = [(tmp_path / name / 'results.csv').read_text().splitlines() for name in ('whole', 'part')]
    without_time = [[[*row.split(',')[:1], *row.split(',')[2:]] for row in rows] for rows in lines]
    assert without_time[0] == without_time[1]


def test_resume_through_the_config(write_config, tmp_path, monkeypatch):
    config = write_config(train={**FAST, 'epochs': 2})
    original = DistillationTrainer.run_callbacks

    def interrupt(self, event):
        if event == 'on_train_epoch_start' and self.epoch == 1:
            raise Interrupted
        return original(self, event)

    monkeypatch.setattr(DistillationTrainer, 'run_callbacks', interrupt)
    with pytest.raises(Interrupted):
        kd_dense.yolo.train(config, tmp_path / 'run')
    monkeypatch.setattr(DistillationTrainer, 'run_callbacks', original)
    kd_dense.yolo.train(config, tmp_path / 'run', resume=True)
    assert len((tmp_path / 'run' / 'results.csv').read_text().splitlines()) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.py', 'run']  # in place
    with pytest.raises(ConfigError, match='this run is finished'):
        kd_dense.yolo.train(config, tmp_path / 'run', resume=True)
    with pytest.raises(ConfigError, match='resume: there is no checkpoint'):
        kd_dense.yolo.train(config, tmp_path / 'run', resume=tmp_path / 'nothing.pt')
    kd_dense.yolo.train(config, tmp_path / 'new', resume=True)  # nothing there: starts anew, as MMEngine does
    assert len((tmp_path / 'new' / 'results.csv').read_text().splitlines()) == 3


def test_resume_with_other_distillers_is_refused(write_config, student_yaml, data, tmp_path):
    trainer = run(write_config(), tmp_path / 'run', student_yaml(), data, stop_before=1, epochs=2)
    other = write_config('other.py', distillers={'mimic': {'type': 'FeatureMimic', 'taps': 'neck'}})
    with pytest.raises(ConfigError, match='distillers are not those of the run'):
        run(other, tmp_path / 'run', student_yaml(), data, resume=str(trainer.last))


def test_recovery_from_a_loss_that_is_not_a_number(write_config, student_yaml, data, tmp_path):
    trainer = DistillationTrainer(
        overrides={
            **FAST, 'epochs': 3, 'model': student_yaml(), 'data': str(data), 'distill_model': str(write_config()),
            'project': str(tmp_path), 'name': 'run',
        }
    )  # fmt: skip
    restored = []

    def poison(trainer):
        if trainer.epoch == 1 and not restored:
            restored.append(None)
            with torch.no_grad():
                next(trainer.distillation.student_model.parameters()).fill_(float('nan'))
                next(trainer.distillation.distillers.parameters()).fill_(float('nan'))

    def look(trainer):
        if trainer.nan_recovery_attempts and len(restored) == 1:
            restored.append(all(torch.isfinite(p).all() for p in trainer.distillation.parameters()))
            restored.append(trainer.ema.ema.teacher_model is None)

    trainer.add_callback('on_train_batch_start', poison)
    trainer.add_callback('on_train_epoch_start', look)
    trainer.train()
    assert restored == [None, True, True]
    assert len(trainer.csv.read_text().splitlines()) == 4
    for value in YOLO(str(trainer.last)).model.state_dict().values():
        assert torch.isfinite(value).all()


def test_a_poisoned_average_is_replaced_by_the_weights(write_config, student_yaml, data, tmp_path):
    trainer = DistillationTrainer(
        overrides={
            **FAST, 'model': student_yaml(), 'data': str(data), 'distill_model': str(write_config()),
            'project': str(tmp_path), 'name': 'run',
        }
    )  # fmt: skip

    def poison(trainer):
        next(trainer.ema.ema.student_model.parameters()).fill_(float('inf'))

    trainer.add_callback('on_train_epoch_end', poison)
    trainer.train()
    expected = next(trainer.distillation.student_model.parameters())
    torch.testing.assert_close(next(YOLO(str(trainer.last)).model.parameters()), expected.detach().half().float())
