"""TransKD: values in float64, the properties of its paper and code, and runs on real transformers."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_dense import Distillation
from kd_dense.connectors import as_tokens
from kd_dense.context import Context
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.description import Probe
from kd_dense.distillers import TransKD
from kd_dense.engine.run import train
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.models.build import build_model
from tests.helpers import tiny
from tests.helpers.toys import resized
from tests.helpers.waits import Waits

VARIANTS = ['base', 'gl', 'ea']
ALPHA = (0.1, 0.1, 0.5, 1.0)
STUDENT, TEACHER = [32, 64, 160, 256], [64, 128, 320, 512]  # SegFormer and PVTv2: B0 and B2
CANVAS = (36, 52)  # not a multiple of 32: 9 x 13, 5 x 7, 3 x 4, 2 x 2


def grids(canvas=CANVAS, strides=(4, 2, 2, 2)):
    sizes = []
    for stride in strides:
        canvas = tuple(-(-n // stride) for n in canvas)
        sizes.append(canvas)
    return sizes


def side(widths, batch=2, canvas=CANVAS):
    """What both roles give for a transformer of these widths: maps and tokens."""
    return {
        'features': [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(widths, grids(canvas))],
        'embeddings': [torch.randn(batch, s[0] * s[1], c, dtype=torch.float64) for c, s in zip(widths, grids(canvas))],
    }


def probe(tensors, canvas=CANVAS):
    shapes = {role: [torch.Size((1, *x.shape[1:])) for x in xs] for role, xs in tensors.items()}
    return Probe(shapes, {'features': ('backbone',), 'embeddings': ('patch_embeddings',)}, canvas, 'none')


def ready(variant, student, teacher, canvas=CANVAS, **options):
    method = TransKD(variant, **dict(dict(mid_channels=8, heads=4), **options))
    method.setup(probe(student, canvas), probe(teacher, canvas))
    return method.double()


def batch_of(student, canvas=CANVAS, **more):
    count = len(student['features'][0])
    return Context(canvas=canvas, image=torch.randn(count, 3, *canvas, dtype=torch.float64), **more)


def array(x):
    return torch.as_tensor(x).detach().double().numpy()


def hcl(s, t):
    """With pooled maps of both sides."""
    total = weights = 0.0
    for cells, weight in [(None, 1.0)] + [
        (c, 0.5 ** (i + 1)) for i, c in enumerate(c for c in (4, 2, 1) if c < s.shape[2])
    ]:
        pooled = [
            array(x if cells is None else nn.functional.adaptive_avg_pool2d(torch.as_tensor(x), cells)) for x in (s, t)
        ]
        total, weights = total + weight * ((pooled[0] - pooled[1]) ** 2).mean(), weights + weight
    return total / weights


# -- values ------------------------------------------------------------------------------------------------------------


def embedded(method, student, context):
    """``P_m`` by the equations, from the connectors' outputs (which have tests of their own)."""
    for i, e in enumerate(student['embeddings']):
        e = method.mixer(e) if method.variant == 'gl' and i == 3 else e
        pea = method.pea[str(i)]
        p = array(e) @ array(pea.weight).T + array(pea.bias)
        if method.variant == 'ea':
            q = method.ea[str(i)](student['features'][i - 1] if i else context.image)
            w, v = (0.1 * (i + 1), 0.1 * (i + 5))
            p = w * p + v * array(q).reshape(*q.shape[:2], -1).transpose(0, 2, 1)
        yield p


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('variant', VARIANTS)
def test_value_equals_numpy(variant, batch):
    student, teacher = side((4, 8, 8, 16), batch), side((6, 12, 24, 12), batch)
    method, context = ready(variant, student, teacher), batch_of(student)
    losses = method(student, teacher, context)
    outputs = method.csf(student['features'])
    feature = sum(hcl(array(o), array(t)) for o, t in zip(outputs, teacher['features'], strict=True))
    embedding = sum(
        alpha * ((p - array(t)) ** 2).mean()
        for alpha, p, t in zip(ALPHA, embedded(method, student, context), teacher['embeddings'], strict=True)
    )
    assert list(losses) == ['feature_loss', 'embedding_loss']
    assert losses['feature_loss'].item() == pytest.approx(feature, rel=1e-9)
    assert losses['embedding_loss'].item() == pytest.approx(embedding, rel=1e-6)  # EA's scalars are fp32 numbers


def test_weights_and_levels_are_options():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    method = ready('base', student, teacher, feature_weight=3.0, embedding_weights=(0, 0, 2.0, 0), levels=())
    losses = method(student, teacher, batch_of(student))
    assert list(method.pea) == ['2']  # what takes no part is not there
    pairs = zip(method.csf(student['features']), teacher['features'])
    assert losses['feature_loss'].item() == pytest.approx(3 * sum(((o - t) ** 2).mean().item() for o, t in pairs))
    expected = 2 * (method.pea['2'](student['embeddings'][2]) - teacher['embeddings'][2]).square().mean().item()
    assert losses['embedding_loss'].item() == pytest.approx(expected, rel=1e-9)


def test_either_loss_can_be_left_out():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    method = ready('ea', student, teacher, feature_weight=0)
    assert method.csf is None and list(method(student, teacher, batch_of(student))) == ['embedding_loss']
    method = ready('base', student, teacher, embedding_weights=(0, 0, 0, 0))
    assert list(method(student, teacher, batch_of(student))) == ['feature_loss']
    maps = [{'features': x['features']} for x in (student, teacher)]
    method = ready('base', *maps, embeddings=None)
    assert list(method.taps) == ['features'] and list(method(*maps, batch_of(student))) == ['feature_loss']


def test_other_numbers_of_stages():
    student, teacher = ({role: xs[1:] for role, xs in side(w).items()} for w in ((4, 8, 8, 16), (6, 12, 24, 12)))
    method = ready('ea', student, teacher, embedding_weights=(1, 2, 3))
    assert [method.ea[k].projection.stride[0] for k in '012'] == [8, 2, 2]
    assert method.pea_weights.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert method.ea_weights.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert len(method(student, teacher, batch_of(student))) == 2


def test_embeddings_may_be_maps():
    """As the output of the convolution before the norm is: the tap of the authors' LVT student."""
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    method, context = ready('gl', student, teacher), batch_of(student)
    value = method(student, teacher, context)['embedding_loss']
    for x in (student, teacher):
        x['embeddings'] = [e.transpose(1, 2).reshape(f.shape) for e, f in zip(x['embeddings'], x['features'])]
    TransKD('gl').setup(probe(student), probe(teacher))
    torch.testing.assert_close(method(student, teacher, context)['embedding_loss'], value)


def test_padding_and_ignored_pixels_do_not_count():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    method = ready('base', student, teacher, levels=())
    context = batch_of(student, image_sizes=torch.tensor([[36, 26], [18, 52]]))
    losses = method(student, teacher, context)
    masks = [context.mask(s).numpy() for s in grids()]
    feature = sum(
        ((array(o) - array(t)) ** 2)[np.broadcast_to(m, o.shape)].mean()
        for o, t, m in zip(method.csf(student['features']), teacher['features'], masks)
    )
    assert losses['feature_loss'].item() == pytest.approx(feature, rel=1e-9)
    embedding = 0
    for alpha, p, t, m in zip(ALPHA, embedded(method, student, context), teacher['embeddings'], masks):
        embedding += alpha * ((p - array(t)) ** 2)[np.broadcast_to(m.reshape(2, -1, 1), p.shape)].mean()
    assert losses['embedding_loss'].item() == pytest.approx(embedding, rel=1e-9)
    method.use_mask = False
    unmasked = method(student, teacher, context)
    torch.testing.assert_close(unmasked, method(student, teacher, batch_of(student)))
    assert abs(unmasked['embedding_loss'].item() / embedding - 1) > 1e-3


def test_a_teacher_of_other_resolution_is_resized():
    """Maps, and tokens as maps."""
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12), canvas=(72, 104))
    method = TransKD(mid_channels=8, levels=())
    method.setup(probe(student), probe(teacher, (72, 104)))
    losses = method.double()(student, teacher, batch_of(student))
    feature = sum(
        ((array(o) - resized(array(t), o.shape[2:])) ** 2).mean()
        for o, t in zip(method.csf(student['features']), teacher['features'])
    )
    assert losses['feature_loss'].item() == pytest.approx(feature, rel=1e-6)
    embedding = 0
    for alpha, p, t, size, large in zip(
        ALPHA, embedded(method, student, None), teacher['embeddings'], grids(), grids((72, 104))
    ):
        t = resized(array(t).transpose(0, 2, 1).reshape(2, -1, *large), size)
        embedding += alpha * ((p.transpose(0, 2, 1).reshape(t.shape) - t) ** 2).mean()
    assert losses['embedding_loss'].item() == pytest.approx(embedding, rel=1e-6)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_equal_differences(variant):
    student, teacher = side((4, 4, 4, 4), canvas=(20, 28)), side((3, 2, 3, 2), canvas=(20, 28))
    method = ready(variant, student, teacher, (20, 28), mid_channels=4, min_channels=2)
    context = batch_of(student, (20, 28))
    role = {'base': 'features', 'gl': 'embeddings', 'ea': 'features'}[variant]
    stage = {'base': 1, 'gl': 3, 'ea': 2}[variant]
    assert torch.autograd.gradcheck(
        lambda x: sum(
            method(
                student | {role: [*student[role][:stage], x, *student[role][stage + 1 :]]}, teacher, context
            ).values()
        ),
        student[role][stage].requires_grad_(),
        fast_mode=True,
    )


def test_does_not_wait_for_the_device():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    context = batch_of(student, image_sizes=torch.tensor([[36, 26], [18, 52]]))
    for variant in VARIANTS:
        method = ready(variant, student, teacher)
        with Waits() as waits:
            sum(method(student, teacher, context).values()).backward()
        assert waits.seen == []


# -- the properties of the paper and its code --------------------------------------------------------------------------


@pytest.mark.parametrize('variant, total', [('base', 4_563_124), ('gl', 5_219_254), ('ea', 5_534_076)])
def test_property_6_parameters_equal_the_published_table(variant, total):
    """The published totals contain the authors' B0 of 3,719,284 parameters."""
    sizes = grids((64, 64))
    shapes = [
        {
            'features': [torch.Size((1, c, *s)) for c, s in zip(widths, sizes)],
            'embeddings': [torch.Size((1, s[0] * s[1], c)) for c, s in zip(widths, sizes)],
        }
        for widths in (STUDENT, TEACHER)
    ]
    method = TransKD(variant)
    method.setup(*(Probe(s, {'features': ('f',), 'embeddings': ('e',)}, (64, 64), 'none') for s in shapes))
    own = sum(p.numel() for p in method.parameters())
    assert own == {'base': 650_304 + 193_536, 'gl': 843_840 + 656_130, 'ea': 843_840 + 970_952}[variant]
    assert own + 3_719_284 == total
    if variant == 'ea':
        assert method.pea_weights.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert method.ea_weights.tolist() == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_property_1_no_loss_where_student_and_teacher_agree():
    student = side((4, 8, 8, 16))
    method = ready('base', student, student)
    with torch.no_grad():
        for pea in method.pea.values():
            pea.weight.copy_(torch.eye(len(pea.weight)))
            pea.bias.zero_()
    teacher = {'features': method.csf(student['features']), 'embeddings': student['embeddings']}
    losses = method(student, teacher, batch_of(student))
    assert losses['feature_loss'].item() == 0 and losses['embedding_loss'].item() == 0


@pytest.mark.parametrize('batch, idle', [(1, 'fc'), (3, 'fc1')])
@pytest.mark.parametrize('variant', VARIANTS)
def test_properties_8_and_13_gradients_of_one_and_of_several_samples(variant, batch, idle):
    student, teacher = side((4, 8, 8, 16), batch), side((6, 12, 24, 12), batch)
    student, teacher = ({r: [x.requires_grad_() for x in xs] for r, xs in s.items()} for s in (student, teacher))
    method = ready(variant, student, teacher)
    sum(method(student, teacher, batch_of(student)).values()).backward()
    assert all(x.grad is None for xs in teacher.values() for x in xs)
    assert all(x.grad.abs().sum() > 0 for xs in student.values() for x in xs)
    without = {n for n, p in method.named_parameters() if p.grad is None}
    assert without == {n for n, _ in method.named_parameters() if re.fullmatch(rf'csf\.select\.\d\.{idle}\..+', n)}
    names = {id(p): n for n, p in method.named_parameters()}
    assert {names[id(p)] for p in method.idle_parameters()} == without
    assert len(without) == (9 if idle == 'fc' else 3)


def test_property_11_ea_without_assistants_is_base():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    base, ea = ready('base', student, teacher), ready('ea', student, teacher)
    assert not ea.load_state_dict(base.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        ea.pea_weights.fill_(1), ea.ea_weights.fill_(0)
    context = batch_of(student)
    torch.testing.assert_close(ea(student, teacher, context), base(student, teacher, context))


# -- on real models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teachers')
    return {
        kind: dict(
            config=tiny.transformer(kind, 8), checkpoint=tiny.saved(tiny.transformer(kind, 8), folder / kind, CLASSES)
        )
        for kind in ('mit', 'pvt', 'swin')
    }


def joined(teacher, student='mit', **options):
    model = Distillation(tiny.transformer(student), teacher, {'transkd': dict(dict(type='TransKD'), **options)})
    model.init_weights()
    model.progress = 0.0
    return model.train()


def losses_of(model, batch):
    return model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')


def total_of(losses):
    return sum(value.sum() for name, value in losses.items() if 'loss' in name)


@pytest.mark.parametrize(
    'student, teacher', [('mit', 'mit'), ('pvt', 'pvt'), ('swin', 'swin'), ('mit', 'swin'), ('swin', 'mit')]
)
@pytest.mark.parametrize('variant', VARIANTS)
def test_pairs_of_backbones_take_a_step(teachers, student, teacher, variant):
    model = joined(teachers[teacher], student, variant=variant)
    maps, tokens = model.distillers.table
    assert maps.student.startswith('backbone: [B, 4, 16, 16] stride 4') and maps.connector_parameters > 0
    assert tokens.teacher.startswith('patch_embeddings: [B, 256, 8]')
    assert (
        maps.connector == {'base': 'CSF, 4 x PEA', 'gl': 'CSF, 4 x PEA, GLMixer', 'ea': 'CSF, 4 x PEA, 4 x EA'}[variant]
    )
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    logs = model.train_step(tiny.segmentation_batch(), wrapper)
    model.distillers.verify_gradients()
    assert logs['kd.transkd.feature_loss'] > 0 and logs['kd.transkd.embedding_loss'] > 0
    assert torch.isfinite(logs['loss'])
    build_model(tiny.transformer(student), 'student').load_state_dict(model.state_dict(), strict=True)


def test_ea_sees_the_image_that_the_student_sees(teachers):
    model = joined(teachers['mit'], variant='ea')
    seen = []
    model.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.distillers.methods['transkd'].ea['0'].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses_of(model, tiny.segmentation_batch())
    assert len(seen) == 2 and torch.equal(*seen) and seen[0].shape == (2, 3, 64, 64)


@pytest.mark.parametrize('variant', VARIANTS)
def test_property_9_how_far_the_embedding_loss_reaches(teachers, variant):
    def reached(**options):
        model = joined(teachers['mit'], variant=variant, feature_weight=0, **options)
        losses_of(model, tiny.segmentation_batch())['kd.transkd.embedding_loss'].backward()
        layers = model.student.backbone.layers
        return [i for i, layer in enumerate(layers, 1) if any(p.grad is not None for p in layer[1].parameters())]

    assert reached() == [1, 2, 3]  # never the blocks of the last stage
    if variant != 'gl':
        assert reached(embedding_weights=(1, 0, 0, 0)) == []


def test_property_9_assistants_reach_the_blocks_below_their_stage(teachers):
    """With the way through PEA cut off: by F_1 to F_3."""
    model = joined(teachers['mit'], variant='ea', feature_weight=0)
    for pea in model.distillers.methods['transkd'].pea.values():
        pea.register_forward_hook(lambda module, inputs, output: output.detach())
    losses_of(model, tiny.segmentation_batch())['kd.transkd.embedding_loss'].backward()
    for i, layer in enumerate(model.student.backbone.layers):
        assert all((p.grad is None) == (i == 3) for p in layer.parameters())


@pytest.mark.parametrize('variant', VARIANTS)
def test_property_12_predictions_are_those_of_the_plain_student(teachers, variant):
    model = joined(teachers['mit'], variant=variant).eval()
    plain = build_model(tiny.transformer('mit'), 'student').eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    batch = tiny.segmentation_batch()
    for a, b in zip(model.test_step(copy.deepcopy(batch)), plain.test_step(batch), strict=True):
        assert torch.equal(a.seg_logits.data, b.seg_logits.data)


@pytest.mark.parametrize('count, used', [(1, 'fc1'), (2, 'fc.0')])
def test_verification_excuses_the_idle_branch_and_no_other(teachers, count, used):
    for broken in (False, True):
        model = joined(teachers['mit'])
        if broken:
            select = model.distillers.methods['transkd'].csf.select[1]
            select.get_submodule(used).weight.register_hook(torch.zeros_like)
        total_of(losses_of(model, tiny.segmentation_batch(count))).backward()
        if not broken:
            model.distillers.verify_gradients()
    with pytest.raises(DistillationError, match=rf'distillers\.transkd: no gradient reached csf\.select\.1\.{used};'):
        model.distillers.verify_gradients()


def test_distributed_training_needs_no_search_for_unused_parameters(teachers, tmp_path):
    """Batches of one and of several in turn: each leaves the other's branch idle."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = joined(teachers['mit'])
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for count in (2, 1, 2):
            data = model.data_preprocessor(tiny.segmentation_batch(count), True)
            losses = wrapped(**data, mode='loss')
            total_of(losses).backward()
            assert all(p.grad is not None for p in model.parameters())
            wrapped.zero_grad(set_to_none=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('variant', VARIANTS)
def test_mixed_precision_forms_the_losses_in_fp32(teachers, variant):
    batch = tiny.segmentation_batch()
    values = []
    for enabled in (False, True):
        model = joined(teachers['mit'], variant=variant)
        model.load_state_dict(build_seeded())
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            torch.manual_seed(0)
            losses = losses_of(model, batch)
        assert losses['kd.transkd.feature_loss'].dtype == losses['kd.transkd.embedding_loss'].dtype == torch.float32
        total_of(losses).backward()
        model.distillers.verify_gradients()
        values.append([losses[f'kd.transkd.{k}_loss'].item() for k in ('feature', 'embedding')])
    assert values[1] == pytest.approx(values[0], rel=0.03) and values[1] != values[0]


def build_seeded():
    torch.manual_seed(5)
    model = build_model(tiny.transformer('mit'), 'student')
    model.init_weights()
    return model.state_dict()


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


def weights(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize('variant', VARIANTS)
def test_run__leaves_a_plain_student_and_resumes(variant, teachers, data, tmp_path):
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.transformer('mit'),
        teacher=teachers['mit'],
        distillers=dict(transkd=dict(type='TransKD', variant=variant)),
    )
    cfg = tiny.segmentation_run(model, data)
    train(cfg, str(tmp_path / 'whole'), seed=3)
    checkpoint = weights(tmp_path / 'whole' / 'iter_4.pth')
    plain = build_model(tiny.transformer('mit'), 'student')
    plain.load_state_dict(checkpoint['state_dict'], strict=True)
    state = checkpoint['kd_dense']['distillers']
    assert any('.csf.' in k for k in state) and not any('csf' in k or 'pea' in k for k in checkpoint['state_dict'])
    if variant == 'ea':  # once is enough
        train(cfg, str(tmp_path / 'resumed'), seed=3, resume=str(tmp_path / 'whole' / 'iter_2.pth'))
        resumed = weights(tmp_path / 'resumed' / 'iter_4.pth')
        for part in (lambda c: c['state_dict'], lambda c: c['kd_dense']['distillers']):
            for key, value in part(checkpoint).items():
                torch.testing.assert_close(part(resumed)[key], value, equal_nan=True, msg=key)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_backbone_without_patch_embeddings(tmp_path):
    teacher = dict(config=tiny.segmentor(8), checkpoint=tiny.saved(tiny.segmentor(8), tmp_path / 't.pth'))
    with pytest.raises(
        ConfigError,
        match=r"distillers\.transkd: the teacher has no tap 'patch_embeddings': ResNetV1c is none of the backbones",
    ):
        joined(teacher)
    joined(teacher, embeddings=None)  # maps only


def test_a_student_with_other_outputs(teachers):
    student = tiny.transformer('mit')
    student['backbone']['out_indices'] = (1, 2, 3)
    student['decode_head'].update(in_channels=[8, 8, 16], in_index=[0, 1, 2])
    with pytest.raises(
        ConfigError,
        match=r'distillers\.transkd: taps: stage 4 of the teacher has no counterpart: .*let the student give as many',
    ):
        Distillation(student, teachers['mit'], {'transkd': dict(type='TransKD')})


def test_other_strides(teachers):
    student = tiny.transformer('mit')
    student['backbone']['strides'] = (4, 2, 1, 2)
    with pytest.raises(ConfigError, match=r'taps: stage 3 has stride 8 in the student and 16 in the teacher'):
        Distillation(student, teachers['mit'], {'transkd': dict(type='TransKD')})


def change(role, stage, *shape):
    def apply(tensors):
        tensors[role][stage] = torch.zeros(shape)

    return apply


def drop(role, stage):
    return lambda tensors: tensors[role].pop(stage)


@pytest.mark.parametrize(
    'of, edit, message',
    [
        ('student', drop('embeddings', 3), r'embeddings: stage 4 of the teacher has no counterpart'),
        ('both', drop('embeddings', 3), r'embeddings: 3 patch embeddings do not go with the maps of 4 stages'),
        ('teacher', change('embeddings', 1, 2, 36, 12), r'\[B, 36, 12\] of the teacher in stage 2 is no grid of 5 x 7'),
        ('student', change('embeddings', 0, 2, 9), r'\[B, 9\] of the student in stage 1 is no grid of 9 x 13 tokens'),
        ('student', change('features', 2, 2, 12, 8), r'stage 3 of the student is no map \[B, C, h, w\]'),
    ],
)
def test_shapes_that_do_not_go_together(of, edit, message):
    sides = {'student': side((4, 8, 8, 16)), 'teacher': side((6, 12, 24, 12))}
    for name, tensors in sides.items():
        if of in (name, 'both'):
            edit(tensors)
    with pytest.raises(ConfigError, match=message) as error:
        TransKD(heads=4).setup(*map(probe, sides.values()))
    assert '\n' not in str(error.value)


def test_ea_needs_grids_that_an_overlapping_embedding_gives():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    for tensors in (student, teacher):
        for role, x in (('features', torch.zeros(2, 4, 4, 7)), ('embeddings', torch.zeros(2, 28, 4))):
            tensors[role][1] = x
    with pytest.raises(ConfigError, match=r"variant='ea' can not embed 9 x 13 positions as the 4 x 7 .* stage 2"):
        TransKD('ea').setup(probe(student), probe(teacher))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(variant='large'), r"variant must be one of 'base', 'gl', 'ea', not 'large'"),
        (dict(embedding_weights=(0.1, -1, 1, 1)), r'embedding_weights must be >= 0'),
        (dict(feature_weight=0, embedding_weights=(0, 0, 0, 0)), r'and one of them more'),
        (dict(feature_weight=0, embeddings=None), r'and one of them more'),
        (dict(variant='ea', embeddings=None), r"variant='ea' works on patch embeddings; .*choose 'base'"),
        (dict(embedding_weights=(1, 1, 1)), r'embedding_weights: has 3 numbers, but there are 4 stages'),
        (
            dict(variant='gl', embedding_weights=(1, 1, 1, 0)),
            r"variant='gl' works on the last stage, whose weight is 0",
        ),
        (dict(variant='gl', heads=3), r'heads: 3 attention heads do not divide the 16 channels'),
        (dict(variant='ea', ea_weights=(1, 1)), r'ea_weights: needs 4 numbers other than 0'),
        (dict(variant='ea', pea_weights=(1, 1, 0, 1)), r'pea_weights: needs 4 numbers other than 0'),
        (dict(single_sample_branch='fc3'), r"single_sample_branch must be 'fc1' or 'shared'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        TransKD(**options).setup(probe(side((4, 8, 8, 16))), probe(side((6, 12, 24, 12))))


def test_ea_without_images():
    student, teacher = side((4, 8, 8, 16)), side((6, 12, 24, 12))
    with pytest.raises(ConfigError, match="variant='ea' needs the student's images"):
        ready('ea', student, teacher)(student, teacher, Context(canvas=CANVAS))


def test_tokens_of_a_map_are_its_rows():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(as_tokens(x)[:, 9], x[:, :, 1, 4])
