"""kd_dense.Distillation around real segmentors and detectors."""

import copy
import pickle

import pytest
import torch
from mmengine.optim import OptimWrapper

from kd_dense import ConfigError, Distillation
from kd_dense.models.build import build_model
from tests.helpers import tiny

ALL = {
    'logits': dict(type='LogitKD', temperature=2.0),
    'cwd': dict(type='CWD'),
    'mimic': dict(type='FeatureMimic', taps=['backbone:2', 'backbone:3']),
    'nfd': dict(type='NFD', taps='backbone:2'),
}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    config = tiny.segmentor(8)
    return dict(config=config, checkpoint=tiny.saved(config, tmp_path_factory.mktemp('teacher') / 'teacher.pth'))


def segmentation(teacher, distillers=None, **kwargs):
    model = Distillation(student=tiny.segmentor(4), teacher=teacher, distillers=distillers or ALL, **kwargs)
    model.progress = 0.0
    return model.train()


def test_build_model__of_a_config_of_ours__is_its_student():
    assert type(build_model('configs/demo/detection.py', 'student')).__module__.startswith('mmdet')
    assert type(build_model('configs/demo/segmentation.py', 'student')).__module__.startswith('mmseg')


def losses_of(model, batch=None):
    data = model.data_preprocessor(batch or tiny.segmentation_batch(), True)
    return model(**data, mode='loss')


# -- the student's identity --------------------------------------------------------------------------------------------


def test_state_dict__is_that_of_the_plain_student(teacher):
    model = segmentation(teacher)
    plain = build_model(tiny.segmentor(4), 'student')
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    batch = tiny.segmentation_batch()
    for a, b in zip(model.eval().test_step(copy.deepcopy(batch)), plain.eval().test_step(batch), strict=True):
        assert torch.equal(a.seg_logits.data, b.seg_logits.data)


@pytest.mark.parametrize('wrapped', [False, True])
def test_load_state_dict__takes_plain_weights_strictly(teacher, wrapped):
    model = segmentation(teacher)
    plain = build_model(tiny.segmentor(4), 'student')
    target, state = model, plain.state_dict()
    if wrapped:  # as in an EMA or DDP wrapper
        target, state = torch.nn.ModuleDict({'module': model}), {f'module.{k}': v for k, v in state.items()}
    connectors = {k: v.clone() for k, v in model.distillation_state().items()}
    target.load_state_dict(state, strict=True)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, connectors[k]) or v.isnan().all() for k, v in model.distillation_state().items())
    with pytest.raises(RuntimeError, match='backbone.extra'):
        target.load_state_dict(state | {('module.' if wrapped else '') + 'backbone.extra': torch.zeros(1)}, strict=True)


def test_attributes__are_looked_up_on_the_student(teacher):
    model = segmentation(teacher)
    assert model.decode_head is model.student.decode_head
    assert model.with_decode_head
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_teacher__is_nowhere_in_the_trained_model(teacher):
    model = segmentation(teacher)
    teachers = {id(p) for p in model.teacher.model.parameters()}
    assert teachers and not teachers & {id(p) for p in model.parameters()}
    assert not any('teacher' in name for name, _ in model.named_modules())
    assert copy.deepcopy(model).teacher is None
    assert pickle.loads(pickle.dumps(model.teacher)) is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not teachers & {id(p) for group in optimizer.param_groups for p in group['params']}


def test_teacher__stays_frozen_and_unchanged(teacher):
    model = segmentation(teacher)
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    model.teacher.model.train()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        model.train_step(tiny.segmentation_batch(), wrapper)
    assert not model.teacher.model.training
    assert not any(m.training for m in model.teacher.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.model.state_dict().items())


def test_teacher__follows_device_and_dtype(teacher):
    model = segmentation(teacher)
    model.double()
    assert next(model.teacher.model.parameters()).dtype == torch.float64
    copy.deepcopy(model).float()  # a copy is no owner
    assert next(model.teacher.model.parameters()).dtype == torch.float64


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_teacher__runs_first_and_only_to_the_deepest_tap(teacher):
    model = segmentation(teacher, {'mimic': dict(type='FeatureMimic', taps='backbone.layer2')})
    order = []
    model.teacher.model.backbone.register_forward_pre_hook(lambda *_: order.append('teacher'))
    model.student.backbone.register_forward_pre_hook(lambda *_: order.append('student'))
    head = count_calls(model.teacher.model.decode_head.conv_seg)
    layer2, layer3 = count_calls(model.teacher.model.backbone.layer2), count_calls(model.teacher.model.backbone.layer3)
    losses_of(model)
    runs = len(layer3)  # the first forward may run on to learn how often each tapped module fires
    losses_of(model)
    assert order == ['teacher', 'student'] * 2
    assert len(layer2) == 2 and len(layer3) == runs <= 1
    assert not head


def test_teacher__does_not_run_while_every_weight_is_zero(teacher):
    model = segmentation(teacher, {'cwd': dict(type='CWD', loss_weight=dict(value=1.0, start=0.5))})
    calls = count_calls(model.teacher.model.backbone)
    assert not [k for k in losses_of(model) if k.startswith('kd.')]
    assert not calls
    model.progress = 0.5
    assert 'kd.cwd.loss' in losses_of(model)
    assert len(calls) == 1


def test_teacher__sees_images_normalised_for_itself(tmp_path):
    config = tiny.segmentor(8)
    config['data_preprocessor'].update(mean=[10.0, 20.0, 30.0], std=[2.0, 3.0, 4.0], bgr_to_rgb=False)
    path = tiny.saved(config, tmp_path / 't.pth')
    model = segmentation(dict(config=config, checkpoint=path), {'cwd': dict(type='CWD')})
    seen = []
    model.teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = tiny.segmentation_batch()
    losses_of(model, copy.deepcopy(batch))
    expected = model.teacher.model.data_preprocessor(batch, True)['inputs']
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-3)


# -- training ----------------------------------------------------------------------------------------------------------


def test_loss__is_the_students_own_plus_weighted_terms(teacher):
    model = segmentation(teacher)
    plain = build_model(tiny.segmentor(4), 'student').train()
    plain.load_state_dict(model.state_dict())
    batch = tiny.segmentation_batch()
    torch.manual_seed(3)
    losses = losses_of(model, copy.deepcopy(batch))
    torch.manual_seed(3)
    alone = plain(**plain.data_preprocessor(batch, True), mode='loss')
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value, rtol=0, atol=0)
    assert set(losses) - set(alone) == {f'kd.{name}.loss' for name in ALL}


def test_connectors__are_trained(teacher):
    model = segmentation(teacher)
    before = {k: v.clone() for k, v in model.distillers.named_parameters()}
    assert before
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    model.train_step(tiny.segmentation_batch(), wrapper)
    model.distillers.verify_gradients()
    assert all(not torch.equal(v, before[k]) for k, v in model.distillers.named_parameters() if not k.endswith('bias'))


def test_random_state__is_the_same_with_and_without_distillation(teacher):
    torch.manual_seed(5)
    build_model(tiny.segmentor(4), 'student')
    alone = torch.rand(3)
    torch.manual_seed(5)
    segmentation(teacher)
    assert torch.equal(torch.rand(3), alone)


@pytest.mark.parametrize(
    ('kind', 'distillers'),
    [
        ('RetinaNet', ['logits', 'native', 'mimic', 'nfd', 'cwd']),
        ('GFL', ['logits', 'native', 'mimic', 'nfd', 'cwd']),
        ('FCOS', ['logits', 'native', 'mimic', 'nfd', 'cwd']),
        ('FasterRCNN', ['mimic', 'nfd', 'cwd']),
        ('DeformableDETR', ['logits', 'mimic', 'nfd']),
    ],
)
def test_detectors__every_family_takes_a_step(kind, distillers, tmp_path):
    def config(width):
        return tiny.deformable_detr(4 * width) if kind == 'DeformableDETR' else tiny.detector(kind, width)

    levels = ['neck:0', 'neck:1']
    methods = {
        'logits': dict(type='LogitKD'),
        'native': dict(type='Native', loss_weight=1.0),
        'mimic': dict(type='FeatureMimic', taps='neck'),
        'nfd': dict(type='NFD', taps=levels, loss_weight='auto'),
        'cwd': dict(type='CWD', taps=levels),
    }
    teacher = dict(config=config(8), checkpoint=tiny.saved(config(8), tmp_path / 't.pth'))
    model = Distillation(config(4), teacher, {name: methods[name] for name in distillers}).train()
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    logs = model.train_step(tiny.detection_batch(), wrapper)
    model.distillers.verify_gradients()
    assert {f'kd.{name}.loss' for name in distillers} <= set(logs)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in logs.values())
    plain = build_model(config(4), 'student')
    plain.load_state_dict(model.state_dict(), strict=True)


def test_detectors__any_named_module_can_be_tapped(tmp_path):
    teacher = dict(
        config=tiny.detector('FasterRCNN', 8), checkpoint=tiny.saved(tiny.detector('FasterRCNN', 8), tmp_path / 'a.pth')
    )
    model = Distillation(
        tiny.detector('FasterRCNN', 4), teacher, {'rpn': dict(type='FeatureMimic', taps='rpn_head.rpn_conv')}
    )
    assert 'rpn_head.rpn_conv: [B, 16' in model.distillers.table[0].student  # called once per level: five maps
    assert model.distillers.table[0].student.count('[B,') == 5


def test_context__knows_boxes_and_padding(tmp_path):
    teacher = dict(
        config=tiny.detector('RetinaNet', 8), checkpoint=tiny.saved(tiny.detector('RetinaNet', 8), tmp_path / 'a.pth')
    )
    model = Distillation(tiny.detector('RetinaNet', 4), teacher, {'m': dict(type='FeatureMimic', taps='neck')})
    model.progress = 0.25
    data = model.data_preprocessor(tiny.detection_batch(((64, 64), (48, 40))), True)
    context = model.context(**data)
    assert context.canvas == (64, 64)
    assert context.image_sizes.tolist() == [[64, 64], [48, 40]]
    assert [len(b) for b in context.boxes] == [3, 3] and context.labels[0].shape == (3,)
    mask = context.mask((8, 8))
    assert mask[0].all() and mask[1, 0].sum() == 6 * 5


def test_images_without_boxes__work(tmp_path):
    teacher = dict(config=tiny.detector('GFL', 8), checkpoint=tiny.saved(tiny.detector('GFL', 8), tmp_path / 'a.pth'))
    model = Distillation(tiny.detector('GFL', 4), teacher, {'l': dict(type='LogitKD')}).train()
    model.progress = 0.0
    batch = tiny.detection_batch(boxes=0)
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    assert torch.isfinite(losses['kd.l.loss'])


# -- sources of student and teacher ------------------------------------------------------------------------------------


def test_sources__path_package_dict_and_module(teacher, tmp_path):
    path = tmp_path / 'student.py'
    model = {k: v for k, v in tiny.segmentor(4).items() if k != '_scope_'}
    path.write_text(f"default_scope = 'mmseg'\nmodel = {model!r}\n")
    distillers = {'cwd': dict(type='CWD')}
    by_path = Distillation(str(path), teacher, distillers)
    by_module = Distillation(build_model(tiny.segmentor(4), 'student'), teacher, distillers)
    assert list(by_path.state_dict()) == list(by_module.state_dict())
    loaded = build_model(teacher['config'], 'teacher')
    assert Distillation(str(path), loaded, distillers).teacher.model is loaded
    from kd_dense.models.build import model_config

    assert model_config('mmdet::gfl/gfl_r50_fpn_1x_coco.py', 'student')['_scope_'] == 'mmdet'


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(distillers={'a': dict(type='LogitsKD')}),
            r"distillers\.a: unknown distiller 'LogitsKD'; did you mean 'LogitKD'",
        ),
        (
            dict(distillers={'a': dict(type='LogitKD', temprature=2.0)}),
            r"distillers\.a: LogitKD has no option 'temprature'; did you mean 'temperature'",
        ),
        (
            dict(distillers={'a': dict(type='FeatureMimic', taps='backbone.layer5')}),
            r"distillers\.a\.taps \(student\).*'backbone\.layer5'; did you mean 'backbone\.layer",
        ),
        (
            dict(distillers={'a': dict(type='FeatureMimic', taps='backbone:3', loss='mes')}),
            r"distillers\.a: loss: unknown loss 'mes'; did you mean 'mse'",
        ),
        (dict(distillers={'a': dict(type='CWD', loss_weight=-1)}), r'distillers\.a\.loss_weight: .*>= 0'),
        (dict(distillers={'a': dict(type='CWD', loss_weight=float('nan'))}), r'distillers\.a\.loss_weight'),
        (
            dict(distillers={'a': dict(type='CWD', loss_weight=dict(shere=1))}),
            r"no option 'shere'; did you mean 'share'",
        ),
        (dict(distillers={}), 'at least one entry'),
        (dict(distilers={}), "no option 'distilers'; did you mean 'distillers'"),
    ],
)
def test_bad_input__one_sentence_with_the_key(teacher, change, message):
    arguments = dict(student=tiny.segmentor(4), teacher=teacher, distillers=ALL) | change
    with pytest.raises(ConfigError, match=message):
        Distillation(**arguments)


def test_bad_teacher__never_a_random_one(teacher, tmp_path):
    def build(**change):
        return segmentation(teacher | change, {'cwd': dict(type='CWD')})

    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: none is given'):
        build(checkpoint=None)
    with pytest.raises((ConfigError, RuntimeError), match='nowhere.pth'):
        build(checkpoint=str(tmp_path / 'nowhere.pth'))
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: .*have another shape \(backbone\.'):
        build(config=tiny.segmentor(16))
    with pytest.raises(ConfigError, match='missing from it .*bbox_head|not in the model'):
        build(config=tiny.detector('RetinaNet', 8))
    with pytest.raises(ConfigError, match="no option 'chekpoint'; did you mean 'checkpoint'"):
        build(chekpoint='x')
    with pytest.raises(ConfigError, match=r'teacher\.config: there is no config file'):
        build(config=str(tmp_path / 'nowhere.py'))


def test_unsupported_heads__are_named(tmp_path):
    config = tiny.detector('FasterRCNN', 8)
    teacher = dict(config=config, checkpoint=tiny.saved(config, tmp_path / 't.pth'))
    with pytest.raises(ConfigError, match='two-stage detector belong to its proposals'):
        Distillation(tiny.detector('FasterRCNN', 4), teacher, {'l': dict(type='LogitKD')})
    with pytest.raises(ConfigError, match='the teacher has no tap'):
        Distillation(tiny.detector('RetinaNet', 4), teacher, {'l': dict(type='LogitKD')})


def test_class_numbers__must_agree_for_logits(teacher):
    with pytest.raises(ConfigError, match='the student has 5 classes .* the teacher 7 classes'):
        Distillation(tiny.segmentor(4, classes=5), teacher, {'l': dict(type='LogitKD')})


def test_without_the_hook__training_stops_with_a_sentence(teacher):
    model = segmentation(teacher)
    model.progress = None
    with pytest.raises(ConfigError, match=r'custom_hooks: .*kd_dense\.DistillationHook'):
        losses_of(model)


def test_a_teacher_without_normalisation__is_given_pixel_values(tmp_path):
    """YOLOX and its like have no mean and std: what they were trained on are pixel values, here in BGR."""
    student, teacher = tiny.detector('RetinaNet'), tiny.detector('RetinaNet', width=8)
    for key in ('mean', 'std', 'bgr_to_rgb'):
        teacher['data_preprocessor'].pop(key)
    file = tiny.saved(teacher, tmp_path / 'teacher.pth')
    model = Distillation(student, dict(config=teacher, checkpoint=file), dict(neck=dict(type='NFD', taps='neck')))
    batch = tiny.detection_batch(sizes=((64, 64), (64, 64)))
    raw = torch.stack(batch['inputs']).float()
    seen = model.teacher.remap(model.data_preprocessor(batch, training=True)['inputs'])
    assert torch.allclose(seen, raw, atol=1e-3)
    other_way = Distillation(teacher, dict(config=student, checkpoint=tiny.saved(student, tmp_path / 's.pth')),
                             dict(neck=dict(type='NFD', taps='neck')))  # fmt: skip
    expected = (raw.flip(1) - torch.tensor(tiny.MEAN)[None, :, None, None]) / torch.tensor(tiny.STD)[
        None, :, None, None
    ]
    assert torch.allclose(other_way.teacher.remap(raw), expected, atol=1e-4)
