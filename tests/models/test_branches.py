"""Of a dense head of MMDetection the teacher computes only the branch that is tapped."""

import copy

import pytest
import torch

from kd_dense import Distillation
from kd_dense.execution import relative_error
from kd_dense.models.branches import only_tapped_branch
from kd_dense.models.build import build_model
from tests.helpers import tiny
from tests.models.test_execution import flops
from tests.test_folding import lived_in

LOGITS, BOXES = {'logits': dict(type='LogitKD')}, {'boxes': dict(type='LocalizationKD', scores='none')}


def config(kind: str, width: int) -> dict:
    model = tiny.detector('GFL' if kind == 'ATSS' else kind, width)
    if kind == 'ATSS':
        model['type'] = 'ATSS'
        model['bbox_head'] = {k: v for k, v in model['bbox_head'].items() if k not in ('loss_dfl', 'reg_max')} | dict(
            type='ATSSHead',
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True),
        )
    return model


def joined(kind: str, distillers: dict, **options) -> Distillation:
    torch.manual_seed(0)
    teacher = lived_in(build_model(config(kind, 8), 'teacher'))
    model = Distillation(config(kind, 4), dict(config=teacher, **options), distillers).train()
    model.progress = 0.0
    return model


def teacher_step(model: Distillation):
    torch.manual_seed(1)
    data = model.data_preprocessor(copy.deepcopy(tiny.detection_batch()), True)
    taps = model.distillers.taps('teacher', model.distillers.methods)
    sizes = model.context(data['inputs'], data['data_samples']).image_sizes
    return lambda: model.teacher(
        taps, data['inputs'], lambda images: model._run_teacher(images, data['data_samples'], taps), sizes
    )


@pytest.mark.parametrize('kind', ['GFL', 'RetinaNet', 'FCOS', 'ATSS'])
@pytest.mark.parametrize(('distillers', 'idle'), [(LOGITS, 'reg_convs'), (BOXES, 'cls_convs'), (LOGITS | BOXES, None)])
def test_only_what_is_tapped_is_computed__and_comes_out_the_same(kind, distillers, idle, monkeypatch):
    model = joined(kind, distillers)
    step, head = teacher_step(model), model.teacher.model.bbox_head
    values = [step() for _ in range(2)]
    count = flops(step, depth=3)['']
    monkeypatch.setattr('kd_dense.models.branches._idle', lambda model, taps: [])
    expected, whole = step(), flops(step, depth=4)
    for found in values:
        assert list(found) == list(expected)
        assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))
    saved = sum(n for name, n in whole.items() if idle and name.count('.') == 2 and f'.{idle}.' in f'{name}.')
    assert count == whole[''] - saved and (saved > 0) == (idle is not None)
    assert not any('forward' in m.__dict__ for m in head.modules())


def test_heads_that_read_across_or_change_the_width__run_as_they_are():
    model = joined('GFL', LOGITS)
    taps = model.distillers.taps('teacher', model.distillers.methods)
    teacher = model.teacher.model
    for change in (dict(feat_channels=16), dict(forward_single=lambda self, x, scale: None)):
        head = copy.deepcopy(teacher)
        if 'feat_channels' in change:
            head.bbox_head.feat_channels = 16
        else:
            head.bbox_head.__class__ = type('Own', (type(head.bbox_head),), change)
        with only_tapped_branch(head, taps):
            assert not any('forward' in m.__dict__ for m in head.modules())
    with only_tapped_branch(teacher, taps):
        assert [n for n, m in teacher.named_modules() if 'forward' in m.__dict__] == ['bbox_head.reg_convs.0']


def test_a_tap_inside_of_the_head__leaves_all_of_it():
    model = joined('GFL', LOGITS | {'mimic': dict(type='FeatureMimic', taps='bbox_head.reg_convs.0')})
    values = teacher_step(model)()
    assert len(values['bbox_head.reg_convs.0']) == 5 and len(values['logits']) == 5


@pytest.mark.parametrize(
    'options', [dict(fuse=True), dict(precision='bf16'), dict(compile=dict(backend='eager'))], ids=str
)
def test_with_other_options_of_the_teacher(options):
    torch._dynamo.reset()
    plain, found = (teacher_step(joined('GFL', LOGITS, **chosen)) for chosen in ({}, options))
    for _ in range(2):
        assert relative_error(found()['logits'], plain()['logits']) < 0.02
