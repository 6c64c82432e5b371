"""Options of an Ultralytics training against distillers: each pair, and all at once.

Ultralytics always clips gradients (to norm 10) and always keeps a moving average, which is what its checkpoints hold.
It has mixed precision on CUDA only; here its loss runs under autocast as the training loop would run it.
"""

from __future__ import annotations

import csv
import functools
import math

import pytest
import torch
from torch import nn

from tests.yolo.conftest import data, student_yaml, teacher_file, write_config  # noqa: F401  (sets up Ultralytics)

from ultralytics import YOLO  # isort: skip
from ultralytics.nn.tasks import DetectionModel  # isort: skip
from ultralytics.utils import YAML  # isort: skip

from kd_dense.yolo import DistillationModel, DistillationTrainer  # isort: skip
from kd_dense.yolo.student_inside import StudentInsideModel  # isort: skip
from kd_dense.yolo.trainer import STATE  # isort: skip
from tests.yolo.helpers import CLASSES, FAST, save_model  # isort: skip
from tests.yolo.test_model import batch_of, join, spread_scores, student_of  # isort: skip

DISTILLERS = {
    'logits': {'type': 'LogitKD'},
    'cwd': {'type': 'CWD', 'taps': 'neck'},
    'mimic': {'type': 'FeatureMimic', 'taps': 'neck'},
    'nfd': {'type': 'NFD', 'taps': 'backbone'},
    'native': {'type': 'Native'},
}
#: Option -> training arguments.
OPTIONS = {'accumulate': {'nbs': 8}, 'compile': {'compile': True}}


def few_layers(width: float) -> dict:
    """A YOLO of a few layers: what there is, has to be compiled."""
    return {
        'nc': len(CLASSES),
        'scales': {'n': [1.0, width, 256]},
        'scale': 'n',
        'backbone': [[-1, 1, 'Conv', [64, 3, 4]], [-1, 1, 'Conv', [128, 3, 2]], [-1, 1, 'C2f', [128, True]]],
        'head': [[-1, 1, 'Conv', [256, 3, 2]], [[2, 3], 1, 'Detect', ['nc']]],
    }


def build(width: float) -> DetectionModel:
    torch.manual_seed(0)
    model = DetectionModel(few_layers(width), ch=3, nc=len(CLASSES), verbose=False)
    model.names = dict(enumerate(CLASSES))
    return model


@pytest.fixture
def run(write_config, data, tmp_path, monkeypatch):  # noqa: F811
    """Train one epoch of two batches, and check what every run must leave."""
    compile_student = DistillationModel.compile_student
    monkeypatch.setattr(DistillationModel, 'compile_student', functools.partialmethod(compile_student, backend='eager'))

    YAML.save(tmp_path / 'student.yaml', few_layers(0.25))
    teacher = save_model(build(0.5), tmp_path / 'teacher.pt')

    def train(distillers: dict, **arguments) -> DistillationTrainer:
        config = write_config(distillers=distillers, teacher={'checkpoint': str(teacher)})
        trainer = DistillationTrainer(
            overrides={
                **FAST,
                'model': str(tmp_path / 'student.yaml'),
                'data': str(data),
                'distill_model': str(config),
                'project': str(tmp_path),
                'name': 'run',
                **arguments,
            }
        )
        seen = {'steps': 0, 'norms': [], 'compile': []}

        def see_step(optimizer, args, kwargs):
            gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            seen['steps'] += 1
            seen['norms'].append(float(torch.stack([g.norm() for g in gradients]).norm()))

        def on_model_save(trainer):  # before the end of training takes our state away
            checkpoint = torch.load(trainer.last, weights_only=False)
            seen['compile'].append(bool(checkpoint['train_args']['compile']))
            assert set(checkpoint[STATE]['distillers']) == set(trainer.distillation.distillers.state_dict())

        trainer.add_callback('on_train_start', lambda trainer: trainer.optimizer.register_step_pre_hook(see_step))
        trainer.add_callback('on_model_save', on_model_save)
        trainer.train()
        with open(trainer.csv) as file:
            (row,) = csv.DictReader(file)
        for name in distillers:
            assert math.isfinite(float(row[f'train/{name}'])) and float(row[f'train/{name}']) > 0
        assert seen['compile'] == ['compile' in arguments]  # a resumed run compiles again
        assert seen['steps'] == (1 if 'nbs' in arguments else 2)
        assert all(norm <= 10.001 for norm in seen['norms'])
        check_plain(trainer)
        return trainer

    return train


def check_plain(trainer: DistillationTrainer) -> None:
    """``last.pt`` is the moving average of the student, and nothing else."""
    student = YOLO(trainer.last).model
    assert type(student) is DetectionModel
    build(0.25).load_state_dict(student.state_dict(), strict=True)
    average = trainer.ema.ema.student_model.state_dict()
    assert list(average) == list(student.state_dict())
    for name, value in student.state_dict().items():  # kept in half precision
        torch.testing.assert_close(value.float(), average[name].half().float(), msg=name)
    raw = dict(trainer.distillation.student_model.named_parameters())
    assert any(not torch.equal(value, average[name]) for name, value in raw.items())


@pytest.mark.slow
@pytest.mark.parametrize('name', DISTILLERS)
@pytest.mark.parametrize('option', OPTIONS)
def test_pairs(option, name, run):
    run({name: DISTILLERS[name]}, **OPTIONS[option])


def test_all_options_and_all_distillers_at_once(run):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(DISTILLERS, **OPTIONS['accumulate'], **OPTIONS['compile'])
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0


@pytest.mark.parametrize('name', DISTILLERS)
def test_amp__connects_in_bfloat16_and_reduces_in_fp32(name):
    student, teacher = student_of('yolov8'), student_of('yolov8', width=0.1875, seed=1)
    spread_scores(teacher)
    model = join(student, teacher, {'kd': DISTILLERS[name]}).train()
    dtypes = []
    for module in (m for m in model.distillers.modules() if isinstance(m, nn.Conv2d)):
        module.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    plain = float(model.loss(batch_of())[1]['kd'])
    assert set(dtypes) <= {torch.float32}
    dtypes.clear()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        parts, items = model.loss(batch_of())
    assert set(dtypes) == ({torch.bfloat16} if list(model.distillers.parameters()) else set())
    assert items['kd'].dtype == torch.float32
    assert float(items['kd']) == pytest.approx(plain, rel=0.05)
    parts.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.distillers.parameters())


@pytest.mark.slow
def test_compile__trains_like_eager(run, tmp_path):
    """Also while an automatic weight is calibrated, which backpropagates twice."""
    distillers = {'mimic': dict(DISTILLERS['mimic'], loss_weight='auto'), 'logits': DISTILLERS['logits']}
    plain = run(distillers, name='plain').distillation.student_model.state_dict()
    torch._dynamo.reset()
    compiled = run(distillers, name='compiled', compile=True).distillation.student_model.state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


def _fails(graph, inputs):
    raise RuntimeError('there is no compiler')


def test_compile__where_it_fails_the_training_is_that_without(run, monkeypatch):
    plain = run({'mimic': DISTILLERS['mimic']}, name='plain').distillation.student_model.state_dict()
    compile_student = functools.partialmethod(StudentInsideModel.compile_student, backend=_fails)
    monkeypatch.setattr(DistillationModel, 'compile_student', compile_student)
    said = []
    monkeypatch.setattr('kd_dense.yolo.student_inside.LOGGER.warning', said.append)
    torch._dynamo.reset()
    found = run({'mimic': DISTILLERS['mimic']}, name='fails', compile=True).distillation.student_model.state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, msg=name)
    (sentence,) = (text for text in said if 'compile' in text)
    assert sentence.startswith('compile: torch.compile fails (RuntimeError: there is no compiler), so nothing more')


@pytest.mark.slow
def test_compile__with_the_default_backend(run, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    run({'mimic': DISTILLERS['mimic']}, compile=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: Ultralytics has mixed precision on CUDA only')
@pytest.mark.parametrize('amp', [True, 'bf16'])
def test_amp__on_a_gpu(amp, run):
    assert run(DISTILLERS, amp=amp, device=0).amp
