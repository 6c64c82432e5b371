"""The options of ``teacher`` about how it is run, in Ultralytics' training."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import ModelEMA

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.execution import Execution
from kd_dense.models.build import build_model
from kd_dense.yolo import DistillationModel, train
from kd_dense.yolo.config import read
from kd_dense.yolo.teacher import adapter
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.models.test_execution import flops
from tests.test_execution import Counting
from tests.test_folding import lived_in
from tests.yolo.helpers import CLASSES, build
from tests.yolo.test_model import batch_of, student_of

DISTILLERS = {
    'native': {'type': 'Native'},
    'logits': {'type': 'LogitKD'},
    'cwd': {'type': 'CWD', 'taps': 'backbone'},
}


def join(teacher, distillers=None, **options):
    torch.manual_seed(0)
    model = DistillationModel(
        student_of('yolo11'), copy.deepcopy(teacher), Distillers(distillers or DISTILLERS), Execution.of(options)
    )
    return model.train()


def losses(model) -> dict[str, float]:
    found = {}
    for step in range(2):
        _, items = model.loss(batch_of())
        found |= {f'{step}.{name}': items[name].item() for name in model.distillers.methods}
    return found


@pytest.fixture(scope='module', params=['yolo11', pytest.param('yolo26', marks=pytest.mark.slow)])
def teacher(request):
    return lived_in(build(request.param, 0.1875, seed=1))


@pytest.mark.parametrize(
    'options, tolerance',
    [
        (dict(fuse=True), 1e-4),
        (dict(channels_last=True), 1e-4),
        (dict(precision='bf16', tolerance=0.2), 0.03),
        (dict(precision='fp16'), 0.02),
        pytest.param(dict(compile=dict(backend='eager'), fuse=True), 1e-4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_are_those_of_the_teacher_as_it_is(teacher, options, tolerance):
    torch._dynamo.reset()
    model = join(teacher, **options)
    assert losses(model) == {k: pytest.approx(v, rel=tolerance) for k, v in losses(join(teacher)).items()}
    assert ('compile' in options) == (model._teacher._executor._compiled is not None)


def test_norms_are_folded(teacher):
    model = join(teacher, {'native': {'type': 'Native'}}, fuse=True)
    losses(model)
    with torch.no_grad(), Operations() as operations:
        model.teacher_model(batch_of()['img'])
    left = sum(n for name, n in operations.counts.items() if 'batch_norm' in name)
    norms = [n for n, m in teacher.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    head = f'model.{len(teacher.model) - 1}'
    # what the loss does not need of the head (boxes, the other branch) did not run and is as it was
    assert 0 < left < sum(n.startswith(head) for n in norms) < len(norms)


def test_of_the_head_the_teacher_computes_only_the_tapped_branch(teacher):
    model = join(teacher, {'logits': {'type': 'LogitKD'}})
    net, images = model.teacher_model, batch_of()['img']
    taps = model.distillers.taps('teacher', model.distillers.methods)

    def step():
        model._teacher(taps, images, adapter(net).forward_for(net, taps))

    step()
    head = f'model.{len(net.model) - 1}'
    whole = flops(lambda: net(images), depth=4)
    branches = [name for name, _ in net.model[-1].named_children() if name not in ('cv3', 'dfl')]
    behind = sum(whole.get(f'{head}.{name}.{level}', 0) for name in branches for level in range(net.model[-1].nl))
    found = flops(step)['']
    assert behind > 0
    assert found <= whole[''] - behind  # and without the decoder


def test_compiled_teacher_ends_at_the_deepest_tap(teacher):
    torch._dynamo.reset()
    backend, mimic = Counting(), {'mimic': {'type': 'FeatureMimic', 'taps': 'model.1'}}
    model, deeper, calls = join(teacher, mimic, compile=dict(backend=backend)), [], []
    model.teacher_model.model[2].register_forward_hook(lambda *_: deeper.append(1))
    plain = join(teacher, mimic)
    for _ in range(3):
        _, found = model.loss(batch_of())
        _, wanted = plain.loss(batch_of())
        torch.testing.assert_close(found['mimic'], wanted['mimic'], rtol=1e-5, atol=0)
        calls.append(backend.calls)
    assert calls[1] - calls[0] == calls[2] - calls[1] == backend.graphs == 2
    assert len(deeper) == 1  # in the uncompiled reference, which counts how often the tapped modules run


def test_the_teacher_is_out_of_reach(teacher):
    model = join(teacher, fuse=True, precision='bf16', channels_last=True)
    keys = list(join(teacher).state_dict())
    losses(model)
    assert list(model.state_dict()) == keys
    own = {id(p) for p in model.teacher_model.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in model.teacher_model.parameters())
    average = ModelEMA(model).ema
    assert average.teacher_model is None
    assert pickle.loads(pickle.dumps(model)).teacher_model is None
    model.double()
    assert {p.dtype for p in model.teacher_model.parameters()} == {torch.double}


@pytest.mark.parametrize(
    ('options', 'limit'),
    [
        (dict(precision='fp32'), 0),
        (dict(fuse=True, channels_last=True), 1e-3),
        (dict(precision='bf16', tolerance=0.2), 0.03),
    ],
    ids=str,
)
def test_trained_student_is_that_without_the_option(teacher, options, limit):
    """What three steps changed in the weights differs by no more than the limit, as a share of its length."""
    moved = []
    for chosen in ({}, options):
        model = join(teacher, **chosen)
        before = [p.clone() for p in model.student_model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(batch_of(seed=step))[0].sum().backward()
            optimizer.step()
        pairs = zip(before, model.student_model.parameters(), strict=True)
        moved.append(torch.cat([(b - a).detach().flatten() for a, b in pairs]))
    plain, found = moved
    off = float((found - plain).norm() / plain.norm())
    assert off == 0 if limit == 0 else 0 < off < limit


def test_teacher_taps_are_let_go_before_the_backward(teacher):
    """Not only the tensors that the distillers were given: the graph of the losses holds none of them either."""
    model = join(teacher)
    run, seen = model._teacher, []

    def seeing(*args):
        values = run(*args)
        seen.extend(weakref.ref(t) for tensors in values.values() for t in tensors)
        return values

    seeing.model = run.model
    model._teacher = seeing
    parts, _ = model.loss(batch_of())
    gc.collect()
    assert len(seen) >= 3 and all(r() is None for r in seen)
    parts.sum().backward()
    assert all(p.grad is not None for p in model.distillers.parameters())


def test_detector_of_mmdetection_as_teacher():
    detector = lived_in(build_model(tiny.detector('RetinaNet', 8), 'teacher'))
    mimic = {'mimic': {'type': 'FeatureMimic', 'taps': 'neck'}}
    plain = losses(join(detector, mimic))
    for options, tolerance in ((dict(fuse=True, channels_last=True), 1e-4), (dict(precision='bf16'), 0.05)):
        assert losses(join(detector, mimic, **options)) == {
            k: pytest.approx(v, rel=tolerance) for k, v in plain.items()
        }


@pytest.fixture
def said():
    """What Ultralytics logs."""
    texts = []
    LOGGER.addFilter(keep := lambda record: texts.append(record.getMessage()) or True)
    yield texts
    LOGGER.removeFilter(keep)


def test_trainer_reads_the_options_of_the_config(write_config, tmp_path, monkeypatch):
    class Built(Exception):
        pass

    def build(student, teacher, distillers, execution):
        raise Built(execution)

    monkeypatch.setattr('kd_dense.yolo.views.DistillationModel', build)
    with pytest.raises(Built) as built:
        train(write_config(teacher={'fuse': True, 'precision': 'bf16', 'tolerance': 0.5}), work_dir=tmp_path / 'run')
    assert built.value.args[0] == Execution(fuse=True, precision='bf16', tolerance=0.5)


@pytest.mark.slow
def test_training_with_options_ends_in_a_plain_checkpoint(write_config, student_yaml, tmp_path, said):
    train(write_config(teacher={'fuse': True, 'precision': 'bf16', 'tolerance': 0.5}), work_dir=tmp_path / 'run')
    saved = torch.load(tmp_path / 'run' / 'weights' / 'last.pt', weights_only=False)['model']
    stock = DetectionModel(student_yaml(), nc=len(CLASSES), verbose=False)
    stock.load_state_dict(saved.float().state_dict(), strict=True)
    assert sum('batch norms are folded' in text for text in said) == 1
    assert sum("teacher (fuse=True, precision='bf16'): relative errors" in text for text in said) == 1


@pytest.mark.parametrize(
    'option, message',
    [
        ({'precision': 'half'}, "teacher.precision: must be 'fp32', 'bf16' or 'fp16', not 'half'"),
        ({'fused': True}, "teacher: unknown key 'fused'; did you mean 'fuse'"),
        ({'tolerance': 0.1}, 'teacher.tolerance: is the limit of what fuse'),
    ],
)
def test_wrong_values(write_config, option, message):
    with pytest.raises(ConfigError, match=message):
        read(write_config(teacher=option))
