"""The options of ``teacher`` about how it is run, with real segmentors and detectors."""

import copy
import gc
import math
import weakref

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch.utils.flop_counter import FlopCounterMode

from kd_dense import ConfigError, Distillation
from kd_dense.models.build import build_model
from kd_dense.models.distillation import check_teacher
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.test_execution import Counting
from tests.test_folding import lived_in

SEGMENTATION = {
    'logits': dict(type='LogitKD', temperature=2.0),
    'cwd': dict(type='CWD', taps='backbone:3'),
    'mimic': dict(type='FeatureMimic', taps=['backbone:2', 'backbone:3']),
    'nfd': dict(type='NFD', taps='backbone:2'),
}
DETECTION = {
    'logits': dict(type='LogitKD'),
    'mimic': dict(type='FeatureMimic', taps='neck'),
    'focal': dict(type='BoxGuidedMimic'),
    'pkd': dict(type='PKD'),
}
#: Options -> relative tolerance of the losses.
SWITCHES = [
    (dict(fuse=True), 1e-4),
    (dict(channels_last=True), 1e-4),
    pytest.param(dict(compile=dict(backend='eager'), fuse=True), 1e-4, marks=pytest.mark.slow),
    (dict(precision='bf16'), 0.05),
    (dict(precision='fp16'), 0.02),
    (dict(fuse=True, channels_last=True, precision='bf16'), 0.05),
]


class Toolbox:
    """Student, teacher and batch of one toolbox."""

    def __init__(self, student, teacher, distillers, batch) -> None:
        self.student, self.config, self.distillers, self.batch = student, teacher, distillers, batch
        torch.manual_seed(1)
        self.teacher = lived_in(build_model(teacher, 'teacher.config'))
        self.plain = self.losses(self.joined())

    def joined(self, distillers: dict | None = None, **options) -> Distillation:
        torch.manual_seed(2)
        model = Distillation(
            copy.deepcopy(self.student),
            dict(config=copy.deepcopy(self.teacher), **options),
            distillers or self.distillers,
        )
        model.progress = 0.0
        return model.train()

    def losses(self, model) -> dict[str, float]:
        """Of two steps; they differ by dropout only."""
        found = {}
        for step in range(2):
            torch.manual_seed(3)
            data = model.data_preprocessor(copy.deepcopy(self.batch), True)
            losses = {k: v for k, v in model(**data, mode='loss').items() if k.startswith('kd.')}
            found |= {f'{step}.{k}': float(v) for k, v in losses.items()}
        return found


@pytest.fixture(scope='module', params=['mmseg', 'mmdet'])
def toolbox(request):
    torch.manual_seed(0)
    if request.param == 'mmseg':
        return Toolbox(tiny.segmentor(4), tiny.segmentor(8), SEGMENTATION, tiny.segmentation_batch())
    return Toolbox(tiny.detector('GFL', 4), tiny.detector('GFL', 8), DETECTION, tiny.detection_batch())


@pytest.mark.parametrize('options, tolerance', SWITCHES, ids=str)
def test_losses__are_those_of_the_teacher_as_it_is(toolbox, options, tolerance):
    torch._dynamo.reset()
    model = toolbox.joined(**options)
    found = toolbox.losses(model)
    assert len(found) >= 2 * len(toolbox.distillers)
    assert found == {k: pytest.approx(v, rel=tolerance) for k, v in toolbox.plain.items()}
    if 'compile' not in options:
        assert found != toolbox.plain  # the option did something
    else:
        assert model.teacher._executor._compiled is not None


def test_fuse__leaves_no_norm_that_can_be_folded(toolbox):
    counts = {}
    for fuse in (False, True):
        model = toolbox.joined(fuse=fuse)
        toolbox.losses(model)
        inputs = model.data_preprocessor(copy.deepcopy(toolbox.batch), True)['inputs']
        with torch.no_grad(), Operations() as operations:
            model.teacher.model.extract_feat(inputs)
        counts[fuse] = sum(n for name, n in operations.counts.items() if 'batch_norm' in name)
    # ResNet-18: a stem of one convolution, or of three; eight blocks of two; three projections
    stem = 3 if hasattr(toolbox.teacher, 'decode_head') else 1
    assert counts == {False: stem + 16 + 3, True: 0}


def test_student__keeps_its_checkpoint_and_the_teacher_its_contract(toolbox):
    options = dict(fuse=True, precision='bf16', channels_last=True)
    model, reference = toolbox.joined(**options), toolbox.joined()
    keys = list(reference.state_dict()), list(reference.distillation_state())
    average = ExponentialMovingAverage(model)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    for _ in range(2):
        model.train_step(copy.deepcopy(toolbox.batch), wrapper)
    assert (list(model.state_dict()), list(model.distillation_state())) == keys
    build_model(copy.deepcopy(toolbox.student), 'student').load_state_dict(model.state_dict(), strict=True)
    assert {v.dtype for v in model.state_dict().values()} == {v.dtype for v in reference.state_dict().values()}
    teachers = {id(p) for p in model.teacher.model.parameters()}  # those of folded convolutions among them
    assert not teachers & {id(p) for p in model.parameters()}
    assert not teachers & {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert average.module.teacher is None and copy.deepcopy(model).teacher is None
    assert not any(p.requires_grad for p in model.teacher.model.parameters())
    assert not any(m.training for m in model.teacher.model.modules())
    model.double()
    assert {p.dtype for p in model.teacher.model.parameters()} == {torch.double}


@pytest.mark.parametrize(
    ('options', 'limit'),
    [
        (dict(precision='fp32'), 0),
        (dict(fuse=True, channels_last=True), 1e-4),
        (dict(precision='bf16'), 0.1),  # 0.05 is allowed of a tap
        pytest.param(dict(compile=dict(backend='eager')), 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_trained_student__is_that_without_the_option(toolbox, options, limit):
    """What three steps change in its weights differs by no more than the limit, as a share of its length.

    Without the methods that scale each channel to variance 1: of a random teacher some hardly vary.
    """
    torch._dynamo.reset()
    distillers = {name: one for name, one in toolbox.distillers.items() if name not in ('nfd', 'pkd')}
    moved = []
    for chosen in ({}, options):
        model = toolbox.joined(distillers, **chosen)
        before = {k: v.clone() for k, v in model.student.named_parameters()}
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-5))
        for step in range(3):
            torch.manual_seed(step)
            model.train_step(copy.deepcopy(toolbox.batch), wrapper)
        moved.append(torch.cat([(v - before[k]).detach().flatten() for k, v in model.student.named_parameters()]))
    plain, found = moved
    off = float((found - plain).norm() / plain.norm())
    assert off == 0 if limit == 0 else 0 < off < limit


def test_teacher_taps__are_let_go_before_the_backward(toolbox):
    """Not only the tensors that the distillers were given: the graph of the losses holds none of them either."""
    model = toolbox.joined()
    teacher, seen = model.teacher, []

    def run(*args):
        values = teacher(*args)
        seen.extend(weakref.ref(t) for tensors in values.values() for t in tensors)
        return values

    run.model, run.remap = teacher.model, teacher.remap
    model.teacher = run
    data = model.data_preprocessor(copy.deepcopy(toolbox.batch), True)
    losses = model(**data, mode='loss')
    gc.collect()
    assert len(seen) >= 3 and all(r() is None for r in seen)
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for p in model.distillers.parameters() if p.requires_grad)


def test_student__trains_on_the_same_random_numbers(toolbox):
    states = []
    for options in ({}, dict(fuse=True, precision='fp16')):
        model = toolbox.joined(**options)
        toolbox.losses(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is logged by way of MMEngine."""
    texts = []
    monkeypatch.setattr('kd_dense.models.distillation.print_log', lambda text, logger: texts.append(text))
    return texts


def test_messages__go_to_the_log_of_mmengine(toolbox, said):
    toolbox.losses(toolbox.joined(fuse=True, precision='bf16'))
    assert sum('batch norms are folded into the convolutions before them' in text for text in said) == 1
    expected = "teacher (fuse=True, precision='bf16'): relative errors of its taps against fp32: "
    assert sum(text.startswith(expected) for text in said) == 1


@pytest.mark.slow
def test_compile__is_left_out_with_a_sentence_where_it_fails(toolbox, said):
    torch._dynamo.reset()
    model = toolbox.joined(compile=dict(backend=Counting(fails_at=2)))
    assert toolbox.losses(model) == {k: pytest.approx(v, rel=1e-4) for k, v in toolbox.plain.items()}
    assert sum(text.startswith('teacher.compile: torch.compile fails') for text in said) == 1


def test_compile__ends_at_the_deepest_tap():
    torch._dynamo.reset()
    backend, teacher = Counting(), lived_in(build_model(tiny.segmentor(8), 'teacher'))
    data = tiny.segmentation_batch()
    losses, calls, deeper = {}, [], []
    for compiled in (False, dict(backend=backend)):
        torch.manual_seed(2)
        model = Distillation(
            tiny.segmentor(4),
            dict(config=copy.deepcopy(teacher), compile=compiled),
            {'mimic': dict(type='FeatureMimic', taps='backbone.layer1')},
        ).train()
        model.progress = 0.0
        if compiled:
            for module in (model.teacher.model.backbone.layer2, model.teacher.model.decode_head):
                module.register_forward_hook(lambda *_: deeper.append(1))
        for _ in range(3):
            inputs = model.data_preprocessor(copy.deepcopy(data), True)
            losses.setdefault(bool(compiled), []).append(model(**inputs, mode='loss')['kd.mimic.loss'].item())
            calls.append(backend.calls)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert calls[4] - calls[3] == calls[5] - calls[4] == backend.graphs > 0
    assert len(deeper) == 1  # in the uncompiled reference, which counts how often the tapped modules run


def flops(function, depth=3) -> dict[str, int]:
    """Module path -> floating point operations in it; ``''`` is all."""
    with FlopCounterMode(display=False, depth=depth) as counter, torch.no_grad():
        function()
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return {name.partition('.')[2]: count for name, count in found.items() if name != 'Global'} | {
        '': counter.get_total_flops()
    }


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('kind', ['segmentor', 'GFL', 'FasterRCNN'])
def test_teacher__computes_nothing_behind_the_deepest_tap(kind, fuse):
    build = tiny.segmentor if kind == 'segmentor' else lambda width: tiny.detector(kind, width)
    teacher = build_model(build(8), 'teacher')
    model = Distillation(
        build(4), dict(config=teacher, fuse=fuse), {'mimic': dict(type='FeatureMimic', taps='backbone.layer2')}
    )
    model.progress = 0.0
    batch = tiny.segmentation_batch() if kind == 'segmentor' else tiny.detection_batch()
    data = model.data_preprocessor(batch, True)
    taps = model.distillers.taps('teacher', model.distillers.methods)

    def step():
        model.teacher(taps, data['inputs'], lambda images: model._run_teacher(images, data['data_samples'], taps))

    step()  # the first forward goes to the end, to count
    whole = flops(lambda: teacher.backbone(data['inputs']), depth=2)
    behind = whole['layer3'] + whole['layer4']
    assert 0 < flops(step)[''] == whole[''] - behind < whole['']


@pytest.mark.parametrize('kind', ['FasterRCNN', pytest.param('CascadeRCNN', marks=pytest.mark.slow)])
def test_two_stage_teacher(kind):
    """Its RoI head is run by the distiller, not as far as the deepest tap; it stays as it was loaded."""
    toolbox = Toolbox(
        tiny.detector(kind, 4), tiny.detector(kind, 8), {'rois': dict(type='RoIKD')}, tiny.detection_batch()
    )
    for options, tolerance in ((dict(fuse=True, channels_last=True), 1e-3), (dict(precision='bf16'), 0.1)):
        found = toolbox.losses(toolbox.joined(**options))
        assert found == {k: pytest.approx(v, rel=tolerance) for k, v in toolbox.plain.items()}


def test_options__are_checked_where_the_config_is():
    with pytest.raises(ConfigError, match="teacher: has no option 'precison'; did you mean 'precision'"):
        check_teacher(dict(config='a.py', precison='bf16'))
    with pytest.raises(ConfigError, match="teacher.precision: must be 'fp32', 'bf16' or 'fp16', not 'int8'"):
        check_teacher(dict(config='a.py', precision='int8'))
    with pytest.raises(ConfigError, match=r"teacher.tolerance: with precision='bf16' the tap 'backbone:3' differs"):
        toolbox = Toolbox(
            tiny.segmentor(4),
            tiny.segmentor(8),
            {'cwd': dict(type='CWD', taps='backbone:3')},
            tiny.segmentation_batch(),
        )
        toolbox.losses(toolbox.joined(precision='bf16', tolerance=1e-5))
    toolbox.losses(toolbox.joined(precision='bf16', tolerance=math.inf))
