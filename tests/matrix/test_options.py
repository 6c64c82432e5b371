"""Options of a training against distillers: each pair, and all options at once, in each toolbox.

Every run ends in a plain checkpoint that the stock model loads strictly, and every option is seen to have worked.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from mmengine.registry import MODELS as STOCK_MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from kd_dense import ConfigError
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.amp import set_precision
from kd_dense.engine.run import train
from kd_dense.losses import reduction
from kd_dense.taps import Taps
from tests.helpers import tiny
from tests.helpers.toys import Toy
from tests.tools.conftest import forget_runs, scalars

STEPS = 4
MOMENTUM = 0.25
MAX_NORM = 0.01
SEGMENTATION = {
    'logits': dict(type='LogitKD', temperature=2.0),
    'cwd': dict(type='CWD'),
    'mimic': dict(type='FeatureMimic', taps=['backbone:0', 'backbone:1']),
    'nfd': dict(type='NFD', taps='backbone:1'),
}
DETECTION = {
    'logits': dict(type='LogitKD'),
    'cwd': dict(type='CWD', taps=['neck:0', 'neck:1']),
    'mimic': dict(type='FeatureMimic', taps='neck'),
    'nfd': dict(type='NFD', taps=['neck:0', 'neck:1']),
    'native': dict(type='Native'),
}
#: Option -> entries of the config.
OPTIONS = {
    'amp': {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'},
    'accumulate': {'optim_wrapper.accumulative_counts': 2},
    'clip': {'optim_wrapper.clip_grad': dict(max_norm=MAX_NORM)},
    'ema': {'custom_hooks': [dict(type='EMAHook', momentum=MOMENTUM)]},
    'compile': {'compile': dict(backend='eager')},
}
#: What compiling costs in time is Dynamo's tracing, so the pairs with it are left to `make test-all`.
SLOW = ('compile',)
ALL = {key: value for entries in OPTIONS.values() for key, value in entries.items()}


def segmentor(width: int) -> dict:
    """The tiny segmentor with the first two stages of its backbone: what there is, has to be compiled."""
    model = tiny.segmentor(width)
    model['backbone'].update(num_stages=2, out_indices=(0, 1), strides=(1, 2), dilations=(1, 1))
    # without dropout, so that the numbers of two backends can be compared
    model['decode_head'].update(in_channels=[width, 2 * width], in_index=[0, 1], dropout_ratio=0.0)
    return model


def detector(width: int) -> dict:
    """The tiny RetinaNet on three levels: on the 1x1 maps of a fifth, the gradient of torch's bfloat16 convolution on a
    CPU is now and then not a number, with and without distillers."""
    model = tiny.detector('RetinaNet', width)
    model['neck'].update(num_outs=3)
    model['bbox_head']['anchor_generator']['strides'] = [8, 16, 32]
    return model


@HOOKS.register_module(force=True)
class OptionWitness(Hook):
    """Notes what the loop really did; ``priority`` puts it after the EMA hook."""

    priority = 'LOWEST'
    last: OptionWitness

    def before_train(self, runner) -> None:
        type(self).last = self
        self.model = runner.model
        self.gradient_norms: list[float] = []
        self.weights = [self.student()]
        self.bfloat16 = 0
        for connector in (m for m in self.model.distillers.modules() if isinstance(m, nn.Conv2d)):
            connector.register_forward_hook(self.see_connector)
        runner.optim_wrapper.optimizer.register_step_pre_hook(self.see_step)

    def see_connector(self, module, inputs, output) -> None:
        self.bfloat16 += output.dtype == torch.bfloat16

    def see_step(self, optimizer, args, kwargs) -> None:
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        self.gradient_norms.append(float(torch.stack(gradients).norm()))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.weights.append(self.student())

    def student(self) -> dict:
        return {k: v.detach().clone() for k, v in self.model.student.named_parameters()}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('matrix') / 'scenes')


@pytest.fixture(scope='module')
def teachers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp('teachers')
    configs = {'mmseg': segmentor(8), 'mmdet': detector(8)}
    return {
        name: dict(
            config=model, checkpoint=tiny.saved(model, folder / f'{name}.pth', CLASSES if name == 'mmseg' else None)
        )
        for name, model in configs.items()
    }


def run(toolbox: str, distillers: dict, options: dict, data: Path, teachers: dict, work_dir: Path) -> dict:
    """Four iterations without validation; the checkpoint, and what the witness saw."""
    student = segmentor(4) if toolbox == 'mmseg' else detector(4)
    model = dict(type='kd_dense.Distillation', student=student, teacher=teachers[toolbox], distillers=distillers)
    if toolbox == 'mmseg':
        cfg = tiny.segmentation_run(model, data, iterations=STEPS, interval=STEPS)
    else:
        cfg = tiny.detection_run(model, data, epochs=1)
        model['teacher'] = dict(model['teacher'], classes='ignore')
    for part in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        cfg.pop(part)
    cfg.train_cfg.pop('val_interval')
    cfg.param_scheduler = []
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05))
    cfg.merge_from_dict(options)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='OptionWitness')]
    forget_runs()
    train(cfg, str(work_dir), seed=1)
    (path,) = work_dir.glob('*_[0-9]*.pth')
    init_default_scope(toolbox)
    load_checkpoint(STOCK_MODELS.build(student), str(path), map_location='cpu', strict=True)
    return torch.load(path, weights_only=False)


def check(options: dict, distillers: dict, checkpoint: dict, work_dir: Path) -> None:
    """Every distiller learned, and every option did what it is for."""
    witness = OptionWitness.last
    lines = scalars(work_dir)
    assert len(lines) == STEPS
    for name in distillers:
        assert all(math.isfinite(line[f'kd.{name}.loss']) and line[f'kd.{name}.loss'] > 0 for line in lines)
    assert len(witness.gradient_norms) == STEPS // options.get('optim_wrapper.accumulative_counts', 1)
    moved = [
        any(not torch.equal(after[k], before[k]) for k in before)
        for before, after in zip(witness.weights, witness.weights[1:])
    ]
    accumulates = 'optim_wrapper.accumulative_counts' in options
    assert moved == ([False, True] * (STEPS // 2) if accumulates else [True] * STEPS)
    clips = 'optim_wrapper.clip_grad' in options
    assert all(
        norm == pytest.approx(MAX_NORM, rel=1e-3) if clips else norm > MAX_NORM for norm in witness.gradient_norms
    )
    connectors = any(isinstance(m, nn.Conv2d) for m in witness.model.distillers.modules())
    # Dynamo runs hooks at the time of tracing only, where it inlines what they do
    assert (witness.bfloat16 > 0) == ('optim_wrapper.dtype' in options and connectors)
    # the checkpoint: the weights themselves, or with EMA their average, computed here step by step
    expected = dict(witness.weights[-1])
    if 'custom_hooks' in options:
        expected = dict(witness.weights[1])  # the first update copies
        for weights in witness.weights[2:]:
            expected = {k: (1 - MOMENTUM) * expected[k] + MOMENTUM * weights[k] for k in expected}
        assert any(not torch.allclose(expected[k], witness.weights[-1][k], atol=1e-6) for k in expected)
    for name, value in expected.items():
        torch.testing.assert_close(checkpoint['state_dict'][name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert not any(k.startswith(('student.', 'distillers.', 'teacher')) for k in checkpoint['state_dict'])
    assert set(checkpoint['kd_dense']['distillers']) == set(witness.model.distillers.state_dict())


def pairs(distillers: dict) -> list:
    return [
        pytest.param(option, name, id=f'{option}-{name}', marks=[pytest.mark.slow] if option in SLOW else [])
        for option in OPTIONS
        for name in distillers
    ]


@pytest.mark.parametrize(('option', 'name'), pairs(SEGMENTATION))
def test_segmentation(option, name, data, teachers, tmp_path):
    distillers = {name: SEGMENTATION[name]}
    checkpoint = run('mmseg', distillers, OPTIONS[option], data, teachers, tmp_path)
    check(OPTIONS[option], distillers, checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(('option', 'name'), pairs(DETECTION))
def test_detection(option, name, data, teachers, tmp_path):
    distillers = {name: DETECTION[name]}
    checkpoint = run('mmdet', distillers, OPTIONS[option], data, teachers, tmp_path)
    check(OPTIONS[option], distillers, checkpoint, tmp_path)


@pytest.mark.parametrize(
    ('toolbox', 'compile_it'),
    [
        ('mmseg', False),
        ('mmdet', False),
        pytest.param('mmseg', True, marks=pytest.mark.slow),
        pytest.param('mmdet', True, marks=pytest.mark.slow),
    ],
)
def test_all_options_and_all_distillers_at_once(toolbox, compile_it, data, teachers, tmp_path):
    distillers = SEGMENTATION if toolbox == 'mmseg' else DETECTION
    options = {k: v for k, v in ALL.items() if compile_it or k != 'compile'}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    checkpoint = run(toolbox, distillers, options, data, teachers, tmp_path)
    check(options, distillers, checkpoint, tmp_path)
    assert (torch._dynamo.utils.counters['stats'].get('unique_graphs', 0) > 0) == compile_it


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile__taps_see_the_same_and_nothing_is_compiled_twice(backend):
    """Outputs of modules, of one that runs twice, and of one that the next overwrites; a forward that is cut short."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Toy(4).train()
    taps = Taps(model, ['stage1.1', 'stage2', 'neck:1', 'head'])

    @torch.compiler.disable(recursive=False)
    def values(images):
        with taps.record():
            model(images)
            recorded = taps.take()
        taps.run_until_deepest(lambda: model(images), key='once')
        return recorded, taps.take()

    compiled = torch.compile(values, backend=backend)
    graphs = []
    for _ in range(4):
        images = torch.randn(2, 3, 16, 16)
        for found, wanted in zip(compiled(images), values(images), strict=True):
            assert list(found) == list(wanted)
            for name in wanted:
                for a, b in zip(found[name], wanted[name], strict=True):
                    torch.testing.assert_close(a, b)
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs[0] > 0
    assert graphs[1] == graphs[3]  # the second forward no longer clones what it can read in place
    assert 'forward' not in model.neck.__dict__


def losses(work_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if 'loss' in k} for line in scalars(work_dir)]


@pytest.mark.slow
@pytest.mark.parametrize('weight', [1.0, 'auto'])
@pytest.mark.parametrize(
    ('backend', 'tolerance'), [('eager', 0), ('aot_eager', 1e-3), ('inductor', 1e-3)]
)  # the numbers of a fused kernel differ in the last digits
def test_compile__trains_like_eager(backend, tolerance, weight, data, teachers, tmp_path):
    distillers = {k: dict(SEGMENTATION[k], loss_weight=weight) for k in ('logits', 'nfd')}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = run('mmseg', distillers, {}, data, teachers, tmp_path / 'plain')
    assert not torch._dynamo.utils.counters['stats']
    options = {'compile': dict(backend=backend)}
    compiled = run('mmseg', distillers, options, data, teachers, tmp_path / 'compiled')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    for a, b in zip(losses(tmp_path / 'plain'), losses(tmp_path / 'compiled'), strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance)
    for name, value in plain['state_dict'].items():
        torch.testing.assert_close(compiled['state_dict'][name], value, rtol=tolerance, atol=10 * tolerance, msg=name)


def _fails(graph, inputs):
    raise RuntimeError('there is no compiler')


@pytest.mark.slow
@pytest.mark.parametrize('toolbox', ['mmseg', 'mmdet'])
def test_compile__where_it_fails_the_training_is_that_without(toolbox, data, teachers, tmp_path, monkeypatch):
    """The config that the checkpoint keeps is the user's."""
    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, 'fails', None)
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, 'fails', _fails)
    torch._dynamo.reset()
    distillers = {'nfd': SEGMENTATION['nfd'] if toolbox == 'mmseg' else DETECTION['nfd']}
    plain = run(toolbox, distillers, {}, data, teachers, tmp_path / 'plain')
    found = run(toolbox, distillers, {'compile': dict(backend='fails')}, data, teachers, tmp_path / 'fails')
    for name, value in plain['state_dict'].items():
        torch.testing.assert_close(found['state_dict'][name], value, msg=name)
    assert "compile=dict(backend='fails')" in ''.join(found['meta']['cfg'].split())
    log = next((tmp_path / 'fails').glob('*/*.log')).read_text()
    assert log.count('compile: torch.compile fails (RuntimeError: there is no compiler), so nothing more') == 1


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SEGMENTATION)
def test_amp__connects_in_bfloat16_and_reduces_in_fp32(name, teachers, monkeypatch):
    from kd_dense import Distillation

    model = Distillation(student=segmentor(4), teacher=teachers['mmseg'], distillers={name: SEGMENTATION[name]}).train()
    model.progress = 0.0
    batch = model.data_preprocessor(tiny.segmentation_batch(), True)
    seen = []
    prepare = reduction.prepare

    def spy(student, teacher):
        result = prepare(student, teacher)
        seen.append((student.dtype, teacher.dtype, *(x.dtype for x in result)))
        return result

    for module in ('divergence', 'feature'):
        monkeypatch.setattr(f'kd_dense.losses.{module}.prepare', spy)
    plain = model(**batch, mode='loss')[f'kd.{name}.loss']
    assert {d for dtypes in seen for d in dtypes} == {torch.float32}
    seen.clear()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = model(**batch, mode='loss')[f'kd.{name}.loss']
    assert seen and all(s == t == torch.bfloat16 and a == b == torch.float32 for s, t, a, b in seen)
    assert mixed.dtype == torch.float32
    assert float(mixed) == pytest.approx(float(plain), rel=0.05)
    mixed.backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.distillers.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU, MMEngine does it itself')
def test_set_precision__on_a_cpu():
    from mmengine.config import Config

    asked = Config(dict(optim_wrapper=dict(type='OptimWrapper', accumulative_counts=2)))
    set_precision(asked, amp=True)
    assert asked.optim_wrapper == dict(type='kd_dense.CPUAmpOptimWrapper', accumulative_counts=2)
    named = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16')))
    set_precision(named, amp=False)
    assert named.optim_wrapper == dict(type='kd_dense.CPUAmpOptimWrapper')
    plain = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    set_precision(plain, amp=False)
    assert plain.optim_wrapper.type == 'OptimWrapper'
    with pytest.raises(ConfigError, match='--amp: optim_wrapper.type is ApexOptimWrapper'):
        set_precision(Config(dict(optim_wrapper=dict(type='ApexOptimWrapper'))), amp=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU: MMEngine scales fp16 losses on CUDA only')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('toolbox', ['mmseg', 'mmdet'])
def test_amp__on_a_gpu(toolbox, dtype, data, teachers, tmp_path):
    distillers = SEGMENTATION if toolbox == 'mmseg' else DETECTION
    options = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': dtype}
    checkpoint = run(toolbox, distillers, options, data, teachers, tmp_path)
    assert all(v.isfinite().all() for v in checkpoint['state_dict'].values())
    for name in distillers:
        assert all(line[f'kd.{name}.loss'] > 0 for line in scalars(tmp_path))
