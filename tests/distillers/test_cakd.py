"""Cross-architecture distillation: values against loops in float64, its properties, and real trainings."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from scipy.special import softmax
from torch import nn
from torch.nn import functional as F

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.description import Probe
from kd_dense.distillers import CAKD
from kd_dense.distillers.adversary import Adversary, PatchDiscriminator, TokenDiscriminator
from kd_dense.engine.run import student_alone, train
from kd_dense.errors import ConfigError
from kd_dense.loss_weight import LossWeight
from kd_dense.models.build import build_model
from tests.helpers import tiny, transformers
from tests.helpers.waits import Waits

B, WIDTH, HEADS, D = 2, 6, 2, 4
C = HEADS * D
GRID = (5, 7)
CANVAS = (160, 224)
#: Layout -> leading size, numbers of queries and keys, and whether there is a position bias.
LAYOUTS = {
    'plain': (B, 35, 35, False),
    'class token': (B, 36, 36, False),
    'reduced': (B, 35, 6, False),  # by 2, to 2 x 3
    'windows': (B * 6, 9, 9, True),  # 2 x 3 windows of 3 x 3; the lowest row and the last two columns are beyond
}


def probe(side, layout, student_grid=GRID):
    lead, n, m, bias = LAYOUTS[layout]
    lead = lead // B
    attention = [(lead, HEADS, n, D), (lead, HEADS, m, D), (lead, HEADS, m, D)] + ([(1, HEADS, n, n)] if bias else [])
    features = (1, WIDTH, *student_grid) if side == 'student' else (1, C, *GRID)
    shapes = {
        'features': [torch.Size(features)],
        'attention': [] if side == 'student' else list(map(torch.Size, attention)),
    }
    names = {'features': ('backbone:3',), 'attention': () if side == 'student' else ('x.attn@qkv',)}
    for role in ('logits', 'token'):
        names[role] = (role,)
    shapes['logits'] = [torch.Size((1, 3, 10, 14))] if side == 'student' else [torch.Size((1, 3, 5, 7))]
    shapes['token'] = [torch.Size(features)] if side == 'student' else [torch.Size((1, 36, C))]
    return Probe(shapes, names, CANVAS, '')


def make(layout='plain', profile='paper', student_grid=GRID, **options):
    torch.manual_seed(1)
    plain = dict(replace_prob=0.0, linear=dict(dropout=0.0), views=False, adversary=False, logits=False)
    if profile == 'code':
        plain |= dict(heads=3)
    method = CAKD(**{'attention': 'x.attn', 'profile': profile} | plain | options)
    method.setup(probe('student', layout, student_grid), probe('teacher', layout))
    return method.double()


def tensors(layout='plain', student_grid=GRID):
    torch.manual_seed(2)
    lead, n, m, bias = LAYOUTS[layout]
    q, k, v = (torch.randn(lead, HEADS, count, D).double() for count in (n, m, m))
    student = {
        'features': [torch.randn(B, WIDTH, *student_grid).double()],
        'logits': [torch.randn(B, 3, 10, 14).double()],
        'token': [torch.randn(B, WIDTH, *student_grid).double()],
    }
    teacher = {
        'features': [torch.randn(B, C, *GRID).double()],
        'attention': [q, k, v] + ([torch.randn(1, HEADS, n, n).double()] if bias else []),
        'logits': [torch.randn(B, 3, 10, 14).double()],
        'token': [torch.randn(B, 36, C).double()],
    }
    return student, teacher


def context(masked=False):
    if not masked:
        return Context(CANVAS)
    return Context(CANVAS, image_sizes=torch.tensor([[160, 224], [100, 150]]))


def valid(masked):
    """``[B, h, w]`` by the rule of the context: the centre of a cell of 32 pixels lies inside the image."""
    kept = np.ones((B, *GRID), bool)
    if masked:
        rows, columns = np.indices(GRID)
        kept[1] = (rows * 32 + 16 < 100) & (columns * 32 + 16 < 150)
    return kept


def blocks(layout, own, teacher, kept):
    """Groups of tokens that attend to each other, each with queries, keys and values of both sides.

    Yields ``(student q, k, v), (teacher q, k, v), valid queries, valid keys`` with ``[h, n, d]`` and ``[n]``.
    """
    q, k, v = (x.numpy() for x in teacher[:3])

    def heads(x):  # [C, n] -> [h, n, d]
        return x.reshape(HEADS, -1, x.shape[1]).transpose(0, 2, 1)

    for b in range(B):
        flat, places = [heads(m[b].reshape(C, -1)) for m in own], kept[b].reshape(-1)
        if layout in ('plain', 'class token'):
            first = int(layout == 'class token')
            yield flat, [x[b, :, first:] for x in (q, k, v)], places, places
        elif layout == 'reduced':
            pooled = [F.adaptive_avg_pool2d(torch.tensor(m[b : b + 1]), (2, 3))[0].numpy().reshape(C, -1) for m in own]
            centres = np.ones(6, bool)
            if not kept.all() and b == 1:  # cells of 80 x 74.7 pixels
                rows, columns = np.indices((2, 3))
                centres = ((rows * 80 + 40 < 100) & (columns * 224 / 3 + 112 / 3 < 150)).reshape(-1)
            yield [flat[0], heads(pooled[1]), heads(pooled[2])], [x[b] for x in (q, k, v)], places, centres
        else:
            for window in range(6):
                i, j = 3 * (window // 3), 3 * (window % 3)
                theirs = [x[6 * b + window] for x in (q, k, v)]
                mine, places = [x.copy() for x in theirs], np.zeros(9, bool)
                for cell in range(9):
                    y, x = i + cell // 3, j + cell % 3
                    if y < GRID[0] and x < GRID[1]:
                        places[cell] = kept[b, y, x]
                        for matrix, m in zip(mine, own, strict=True):
                            matrix[:, cell] = m[b, :, y, x].reshape(HEADS, D)
                yield mine, theirs, places, places


def outputs(q, k, v, bias):
    return softmax(np.einsum('hid,hjd->hij', q, k) / math.sqrt(q.shape[-1]) + bias, axis=-1) @ v


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_paper_equals_loops(layout, masked):
    method, (student, teacher) = make(layout), tensors(layout)
    losses = method(student, teacher, context(masked))
    x, kept = student['features'][0], valid(masked)
    own = [F.conv2d(x, c.weight, c.bias, padding=1).detach().numpy() for c in method.projector.values()]
    bias = teacher['attention'][3][0].numpy() if layout == 'windows' else 0
    attention, value = [], []
    for mine, theirs, rows, columns in blocks(layout, own, teacher['attention'], kept):
        attention.append(((outputs(*mine, bias) - outputs(*theirs, bias)) ** 2)[:, rows].ravel())
        both = [np.einsum('hid,hjd->hij', side[2], side[2]) / math.sqrt(D) for side in (mine, theirs)]
        value.append(((both[0] - both[1]) ** 2)[:, columns][:, :, columns].ravel())
    assert losses['attention_loss'].item() == pytest.approx(np.concatenate(attention).mean(), rel=1e-9)
    assert losses['value_loss'].item() == pytest.approx(np.concatenate(value).mean(), rel=1e-9)
    features = 0.0
    weight, bias = method.linear.weight.detach().numpy(), method.linear.bias.detach().numpy()
    for b, i, j in zip(*np.nonzero(kept), strict=True):
        tile = i // 4 * 2 + j // 4
        features += (
            (weight[tile] @ x[b, :, i, j].numpy() + bias[tile] - teacher['features'][0][b, :, i, j].numpy()) ** 2
        ).mean()
    assert losses['features_loss'].item() == pytest.approx(features / kept.sum(), rel=1e-9)
    assert set(losses) == {'attention_loss', 'value_loss', 'features_loss'}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_code_equals_loops(layout, masked):
    method, (student, teacher) = make(layout, 'code'), tensors(layout)
    losses = method(student, teacher, context(masked))
    x, kept = student['features'][0].numpy(), valid(masked)
    weight = method.projector.qkv.weight.detach().numpy()[:, :, 0, 0]
    q, k, v = np.split(np.einsum('oc,bchw->bohw', weight, x), 3, axis=1)

    def tokens(m, b, cells):  # heads of width 2
        return np.stack([m[b, :, y, z].reshape(3, 2) if y < 5 and z < 7 else np.zeros((3, 2)) for y, z in cells], 1)

    attention, value = [], []
    everywhere = [(y, z) for y in range(5) for z in range(7)]
    theirs = [t.numpy() for t in teacher['attention'][:3]]
    for b in range(B):
        first = int(layout == 'class token')
        groups = [everywhere] if layout != 'windows' else [
            [(3 * (w // 3) + c // 3, 3 * (w % 3) + c % 3) for c in range(9)] for w in range(6)
        ]  # fmt: skip
        for g, cells in enumerate(groups):
            tq, tk, tv = (t[len(groups) * b + g, :, first:] for t in theirs)
            rows = columns = np.array([y < 5 and z < 7 and kept[b, min(y, 4), min(z, 6)] for y, z in cells])
            mq, mk, mv = (tokens(m, b, cells) for m in (q, k, v))
            if layout == 'reduced':
                pooled = [F.adaptive_avg_pool2d(torch.tensor(m[b : b + 1]), (2, 3)).numpy() for m in (k, v)]
                mk, mv = (tokens(m, 0, [(y, z) for y in range(2) for z in range(3)]) for m in pooled)
                columns = np.ones(6, bool)
                if masked and b == 1:
                    y, z = np.indices((2, 3))
                    columns = ((y * 80 + 40 < 100) & (z * 224 / 3 + 112 / 3 < 150)).reshape(-1)
            mine = np.einsum('hid,hjd->ij', mq, mk) / math.sqrt(2) / 3
            other = np.einsum('hid,hjd->ij', tq, tk) / math.sqrt(D) / HEADS
            attention.append(((mine - other) ** 2)[rows][:, columns].ravel())
            mine = np.einsum('hid,hjd->ij', mv, mv) / math.sqrt(2) / 3
            other = np.einsum('hid,hjd->ij', tv, tv) / HEADS  # not scaled, as in the public code
            value.append(((mine - other) ** 2)[columns][:, columns].ravel())
    assert losses['attention_loss'].item() == pytest.approx(0.2 * np.concatenate(attention).mean(), rel=1e-9)
    assert losses['value_loss'].item() == pytest.approx(0.05 * np.concatenate(value).mean(), rel=1e-9)
    assert len(method.linear.weight) == 1  # the public code has tiles for 14 x 14 and 7 x 7 only
    weight, bias = method.linear.weight[0].detach().numpy(), method.linear.bias[0].detach().numpy()
    shared = np.einsum('oc,bchw->bohw', weight, x) + bias[:, None, None]
    difference = ((shared - teacher['features'][0].numpy()) ** 2).mean(1)[kept]
    assert losses['features_loss'].item() == pytest.approx(0.05 * difference.mean(), rel=1e-9)


def test_logits_and_class_token_are_compared_by_the_code():
    method = make(
        'class token', 'code', logits='logits', token=dict(student='backbone:3', teacher='backbone.layers.11')
    )
    student, teacher = tensors('class token')
    losses = method(student, teacher, context())
    difference = (student['logits'][0] - teacher['logits'][0]).numpy()
    assert losses['logits_loss'].item() == pytest.approx((difference**2).mean(), rel=1e-9)
    pooled = student['token'][0].numpy().mean((2, 3))
    own = pooled @ method.token.weight.detach().numpy().T + method.token.bias.detach().numpy()
    assert losses['token_loss'].item() == pytest.approx(
        ((own - teacher['token'][0][:, 0].numpy()) ** 2).mean(), rel=1e-9
    )
    assert 'logits' not in make('plain', 'code', logits=False).taps
    assert 'logits' in CAKD('x', profile='code').taps and 'logits' not in CAKD('x').taps


def test_a_dilated_student_is_pooled_to_the_grid_and_a_small_one_enlarged():
    teacher = tensors()[1]
    for grid in ((20, 28), (3, 4)):
        method, student = make(student_grid=grid), tensors(student_grid=grid)[0]
        x = student['features'][0]
        x = F.avg_pool2d(x, 4) if grid == (20, 28) else F.interpolate(x, GRID, mode='bilinear')
        expected = method({**student, 'features': [x]}, teacher, context())
        for name, value in method(student, teacher, context()).items():
            torch.testing.assert_close(value, expected[name])


# -- properties --------------------------------------------------------------------------------------------------------


class Copy(nn.Module):
    """A projector that has learnt its task: gives the teacher's matrices, as maps."""

    def __init__(self, *maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return self.maps


@pytest.mark.parametrize('layout', ['plain', 'class token', 'windows'])
def test_1_equal_matrices_give_exactly_zero_for_any_swap(layout):
    method, (student, teacher) = make(layout, replace_prob=0.5), tensors(layout)
    lead, n, _, _ = LAYOUTS[layout]
    maps = []
    for matrix in teacher['attention'][:3]:
        tokens = matrix[:, :, int(layout == 'class token') :].transpose(1, 2).flatten(2)  # [B', n, C]
        if layout == 'windows':
            tokens = tokens.reshape(B, 2, 3, 3, 3, C).transpose(2, 3).reshape(B, 6, 9, C)[:, :5, :7].flatten(1, 2)
        maps.append(tokens.transpose(1, 2).reshape(B, C, *GRID))
    method.projector = Copy(*maps)
    for _ in range(5):
        losses = method(student, teacher, context())
        assert losses['attention_loss'].item() == 0 and losses['value_loss'].item() == 0
    assert lead in (B, B * 6) and n in (35, 36, 9)


def test_2_replacement_is_on_in_training_only():
    method, (student, teacher) = make(replace_prob=1.0), tensors()
    losses = method(student, teacher, context())
    assert losses['attention_loss'].item() == 0
    (losses['attention_loss'] + losses['value_loss']).backward()
    grads = {name: conv.weight.grad for name, conv in method.projector.items()}
    assert (grads['query'] == 0).all() and (grads['key'] == 0).all() and grads['value'].abs().sum() > 0
    plain = make()(student, teacher, context())
    torch.testing.assert_close(method.eval()(student, teacher, context())['attention_loss'], plain['attention_loss'])


def test_3_seeded_runs_reproduce():
    method, (student, teacher) = make(replace_prob=0.5, linear=dict(dropout=0.5)), tensors()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append({k: v.item() for k, v in method(student, teacher, context()).items()})
    assert values[0] == values[1] != values[2]


def test_8_discriminators():
    patch, token = PatchDiscriminator(), TokenDiscriminator(768)
    assert sum(p.numel() for p in patch.parameters()) == 44_393
    assert patch(torch.randn(3, 1, 196, 196)).shape == (3, 1, 1, 1) == patch(torch.randn(3, 1, 24, 24)).shape
    assert token(torch.randn(2, 5, 768)).shape == (2, 5, 1)
    assert sum(p.numel() for p in token.parameters()) == 768 * 384 + 384 + 384 * 192 + 192 + 192 + 1
    with pytest.raises(RuntimeError):  # what `smallest` is about
        patch(torch.randn(3, 1, 23, 23))


def adversarial(profile='paper', layout='plain', **options):
    return make(layout, profile, adversary=dict(optimizer=dict(type='SGD'), lr_mult=1.0, interval=1, **options))


@pytest.mark.parametrize('profile', ['paper', 'code'])
def test_9_who_gets_which_gradient(profile):
    method, (student, teacher) = adversarial(profile), tensors()
    judge = list(method.adversary.discriminator.module.parameters())
    x = student['features'][0].requires_grad_()
    for t in teacher['attention'] + teacher['features']:
        t.requires_grad_()
    loss = method(student, teacher, context())['adversarial_loss']
    loss.backward()
    # the student's step: it learns from the discriminator, which the released code prevents; the judge does not
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in judge)
    assert all(t.grad is None for t in teacher['attention'] + teacher['features'])
    before, grads = (
        [p.clone() for p in judge],
        {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None},
    )
    assert grads
    method.after_step(0.1)
    # the discriminator's step: it learns, from the teacher too, and nobody else does
    assert any(not torch.equal(a, b) for a, b in zip(before, judge, strict=True))
    assert all(torch.equal(p.grad, grads[n]) for n, p in method.named_parameters() if p.grad is not None)
    assert all(p.grad is None for p in judge)


def test_9_the_discriminators_step_equals_a_plain_one():
    method, (student, teacher) = adversarial(), tensors()
    judge = method.adversary.discriminator.module
    kept = torch.tensor(valid(True)).flatten(1)
    real = teacher['features'][0].flatten(2).transpose(1, 2)[kept]
    fake = method.linear(student['features'][0]).detach().flatten(2).transpose(1, 2)[kept]
    expected = [p.clone().requires_grad_() for p in judge.parameters()]
    names = [n for n, _ in judge.named_parameters()]

    def judged(x):
        return torch.func.functional_call(judge, dict(zip(names, expected, strict=True)), x)

    losses = method(student, teacher, context(masked=True))
    assert losses['adversarial_loss'].item() == pytest.approx(0.1 * -F.logsigmoid(judged(fake)).mean().item(), rel=1e-9)
    loss = -F.logsigmoid(judged(real)).mean() - F.logsigmoid(-judged(fake)).mean()
    gradients = torch.autograd.grad(loss, expected)
    method.after_step(0.3)
    for own, before, gradient in zip(judge.parameters(), expected, gradients, strict=True):
        torch.testing.assert_close(own.data, (before - 0.3 * gradient).data)


def test_9_a_discriminator_learns_to_tell_them_apart():
    torch.manual_seed(0)
    adversary = Adversary(TokenDiscriminator(8), lr_mult=1.0, interval=1)
    real, fake = torch.randn(4, 20, 8) + 1, torch.randn(4, 20, 8) - 1
    first = adversary(real, fake, None, 0).item()
    for i in range(100):
        adversary(real, fake, None, i)
        adversary.after_step(0.1)
    assert first == pytest.approx(math.log(2), abs=0.2) and adversary(real, fake, None, 0).item() > 3
    assert adversary.discriminator(real).min() > 0 > adversary.discriminator(fake).max()


def test_9_interval_counts_iterations_and_nothing_is_held_between():
    adversary = Adversary(TokenDiscriminator(8), interval=5, lr_mult=1.0)
    x, stepped = torch.randn(2, 3, 8, requires_grad=True), []
    for i in range(12):
        before = [p.clone() for p in adversary.discriminator.module.parameters()]
        adversary(x, x, None, i)
        adversary.after_step(0.1)
        if any(not torch.equal(a, b) for a, b in zip(before, adversary.discriminator.module.parameters(), strict=True)):
            stepped.append(i)
        assert adversary._due is None
    assert stepped == [0, 5, 10]
    with torch.no_grad():
        adversary(x, x, None, 0)
    assert adversary._due is None


def test_9_half_precision_is_judged_in_fp32():
    adversary = Adversary(TokenDiscriminator(8))
    x = torch.randn(2, 3, 8)
    with torch.autocast('cpu', torch.bfloat16):
        value = adversary(x.bfloat16(), x.bfloat16(), None, 0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        F.softplus(-adversary.discriminator(x.bfloat16().float())).mean().item(), rel=1e-6
    )


def test_10_ramp_of_the_code():
    weight = LossWeight.parse(CAKD('x', profile='code').default_loss_weight, 'w')
    values = [weight(epoch / 120) for epoch in (0, 25, 26, 30, 35, 119)]
    assert values == pytest.approx([0, 0, 0.02, 0.1, 0.2, 0.2], abs=1e-9)
    assert CAKD('x').default_loss_weight == 1.0


@pytest.mark.parametrize('profile', ['paper', 'code'])
def test_11_views_are_of_training_only(profile):
    method = CAKD('x.attn', profile=profile, views=dict(prob=1.0), logits=False, adversary=False, heads=3)
    method.setup(probe('student', 'plain'), probe('teacher', 'plain'))
    images = torch.rand(2, 3, 64, 64) * 255
    before = images.clone()
    assert not torch.equal(method.view(images, Context((64, 64))), images)
    assert torch.equal(images, before)
    assert method.eval().view(images, Context((64, 64))) is images
    default = CAKD('x.attn', profile=profile, logits=False, adversary=False, heads=3)
    default.setup(probe('student', 'plain'), probe('teacher', 'plain'))
    assert (default.views is not None) == (profile == 'paper')


def test_a_step_does_not_wait_for_the_device():
    method, (student, teacher) = adversarial('paper', 'windows'), tensors('windows')
    method.replace_prob = 0.5
    student['features'][0].requires_grad_()
    with Waits() as waits:
        sum(method(student, teacher, context(masked=True)).values()).backward()
        method.after_step(0.1)
    assert waits.seen == []


# -- options -----------------------------------------------------------------------------------------------------------


def test_terms():
    student, teacher = tensors()
    plain = make()(student, teacher, context())
    weighed = make(terms=dict(attention=2.0, value=0.5))(student, teacher, context())
    torch.testing.assert_close(weighed['attention_loss'], 2 * plain['attention_loss'])
    torch.testing.assert_close(weighed['value_loss'], plain['value_loss'] / 2)
    only = make(terms=dict(attention=0, value=0))
    assert only.projector is None and list(only(student, teacher, context())) == ['features_loss']
    without = make(terms=dict(features=0))
    assert without.linear is None and set(without(student, teacher, context())) == {'attention_loss', 'value_loss'}
    assert make(terms=dict(adversarial=0), adversary=None).adversary is None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(profile='papers'), "profile must be one of .*'code'.* not 'papers'"),
        (dict(attention=['a', 'b']), 'attention: must be the path of one'),
        (dict(terms=dict(atention=1)), "terms: there is no term 'atention'; did you mean 'attention'"),
        (dict(terms=dict(value=-1)), 'terms.value: must be a finite number >= 0'),
        (dict(terms=dict(value=0)), "'attention' and 'value' train one projector"),
        (dict(terms=dict(features=0), adversary=None), "'features' can not be 0"),
        (dict(replace_prob=2), 'replace_prob must lie in 0..1'),
        (dict(kernel_size=2), 'kernel_size must be odd'),
        (dict(linear=dict(mod='tile')), "linear: GroupwiseLinear has no option 'mod'; did you mean 'mode'"),
        (dict(linear=dict(mode='tiles')), 'mode must be one of'),
        (dict(views=dict(probs=1)), "views: MultiView has no option 'probs'; did you mean 'prob'"),
        (dict(views=dict(prob=2)), 'prob must lie in 0..1'),
        (dict(views=3), 'views: must be a dict of options or False, not 3'),
        (dict(adversary=dict(form='saturated')), "form must be 'non_saturating' or 'saturating'"),
        (dict(adversary=dict(interval=0)), 'interval must be'),
        (dict(adversary=dict(lr_mult=0)), 'lr_mult must be'),
        (dict(adversary=dict(optimizer=dict(type='Adm'))), "unknown optimizer 'Adm'; did you mean 'Adam'"),
        (dict(profile='code', heads=4), "heads: 4 does not divide the 6 channels of the student's map"),
        (dict(profile='code', layout='windows', adversary=None), '24 tokens or more, and here there are 9'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_shapes_that_do_not_go_together():
    method = CAKD('x.attn')
    with pytest.raises(ConfigError, match=r'1 x 9 queries and 9 keys do not fit the 5 x 7 grid'):
        teacher = probe('teacher', 'plain')
        teacher.shapes['attention'][:] = [torch.Size((1, 2, 9, 4))] * 3
        method.setup(probe('student', 'plain'), teacher)
    with pytest.raises(ConfigError, match=r'taps: needs one map of each side'):
        student = probe('student', 'plain')
        student.shapes['features'][:] = [torch.Size((1, 35, 6))]
        method.setup(student, probe('teacher', 'plain'))
    with pytest.raises(ConfigError, match='logits: the student has 3 channels of logits and the teacher 5'):
        teacher = probe('teacher', 'plain')
        teacher.shapes['logits'][:] = [torch.Size((1, 5, 5, 7))]
        CAKD('x.attn', logits='logits').setup(probe('student', 'plain'), teacher)


# -- in the toolboxes --------------------------------------------------------------------------------------------------


def options(kind, **more):
    taps = dict(student='backbone:3', teacher='backbone:0') if kind == 'vit' else 'backbone:3'
    return dict(type='CAKD', attention=transformers.ATTENTION[kind], taps=taps, **more)


def mobilenet():
    """Its last stage has 40 channels at stride 32."""
    model = tiny.segmentor(4, in_channels=[8, 8, 16, 40], channels=8)
    model['backbone'] = dict(
        type='MobileNetV2',
        widen_factor=0.125,
        strides=(1, 2, 2, 2, 1, 2, 1),
        out_indices=(1, 2, 4, 6),
        norm_cfg=tiny.NORM,
    )
    return model


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('profile', ['paper', 'code'])
@pytest.mark.parametrize('kind', transformers.ATTENTION)
def test_every_transformer_teaches_a_cnn(kind, profile, amp):
    teacher = build_model(transformers.segmentor(kind), 'teacher')
    more = dict(adversary=False) if profile == 'code' else {}
    model = Distillation(tiny.segmentor(4), teacher, dict(cakd=options(kind, profile=profile, loss_weight=1.0, **more)))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    seen = {}
    teacher.backbone.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0].clone()))
    model.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0].clone()))
    data = tiny.segmentation_batch(4)
    clean = model.data_preprocessor(data, True)['inputs']
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = model.train().train_step(data, wrapper)
    model.distillers.verify_gradients()
    model.distillers.after_step(0.01)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in logs.values())
    terms = {k for k in logs if k.startswith('kd.')}
    assert terms == {f'kd.cakd.{t}_loss' for t in ('attention', 'value', 'features')} | (
        {'kd.cakd.adversarial_loss'} if profile == 'paper' else {'kd.cakd.logits_loss'}
    )
    # the teacher sees the clean images; the student does not, in profile `paper`
    assert torch.equal(seen['teacher'], clean)
    assert torch.equal(seen['student'], clean) == (profile == 'code')


def test_a_teacher_trained_on_another_size_is_probed_with_what_it_will_see():
    config = transformers.segmentor('swin')
    config['data_preprocessor']['size'] = (128, 192)
    teacher = build_model(config, 'teacher')
    model = Distillation(tiny.segmentor(4), teacher, dict(cakd=options('swin', loss_weight=1.0)))
    assert model.distillers.methods['cakd'].linear.grid == (2, 2)
    model.progress = 0.0
    model.train().train_step(tiny.segmentation_batch(), OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01)))
    larger = dict(config=teacher, scale=2.0)
    model = Distillation(tiny.segmentor(4), larger, dict(cakd=options('swin', loss_weight=1.0)))
    assert model.distillers.methods['cakd'].linear.grid == (4, 4)
    model.progress = 0.0
    model.train().train_step(tiny.segmentation_batch(), OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01)))


def test_a_mobilenet_student():
    teacher = build_model(transformers.segmentor('mit'), 'teacher')
    model = Distillation(mobilenet(), teacher, dict(cakd=options('mit')))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    model.train().train_step(tiny.segmentation_batch(), wrapper)
    model.distillers.verify_gradients()


@pytest.mark.parametrize(
    ('kind', 'changes', 'message'),
    [
        ('swin', dict(attention='backbone.stages.3.blocks.1.attn.w_msa'), 'shifts its windows; tap one .*even index'),
        ('swin', dict(attention='backbone.stages.3.blocks.0.attn'), "is a ShiftWindowMSA without qkv; .*attn.w_msa'"),
        ('swin', dict(attention='backbone.stages.2.blocks.0.attn.w_msa'), 'do not fit the 2 x 2 grid .* one stage'),
        ('mit', dict(attention='backbone.layers.3.1.5.attn.attn'), "the model has no module .*layers.3.1.0.attn.attn'"),
    ],
)
def test_wrong_attention_modules(kind, changes, message):
    teacher = build_model(transformers.segmentor(kind), 'teacher')
    with pytest.raises(ConfigError, match=message) as error:
        Distillation(tiny.segmentor(4), teacher, dict(cakd={**options(kind), **changes}))
    assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


def segmentation_config(data, folder):
    teacher = transformers.segmentor('swin')
    path = tiny.saved(teacher, folder / 'teacher.pth', CLASSES)
    cakd = options('swin', adversary=dict(interval=1, lr_mult=1.0, optimizer=dict(type='Adam')))
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=dict(config=teacher, checkpoint=path),
        distillers=dict(cakd=cakd),
    )
    return tiny.segmentation_run(model, data)


def detection_config(data, folder):
    teacher = transformers.detector()
    path = tiny.saved(teacher, folder / 'teacher.pth', CLASSES[1:])
    cakd = options('swin', linear=dict(mode='grid'), adversary=dict(interval=2))
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.detector('RetinaNet', 4),
        teacher=dict(config=teacher, checkpoint=path),
        distillers=dict(cakd=cakd),
    )
    return tiny.detection_run(model, data)


@pytest.mark.parametrize(
    ('config', 'middle', 'last'),
    [(segmentation_config, 'iter_2', 'iter_4'), (detection_config, 'epoch_1', 'epoch_2')],
)
def test_a_run_leaves_a_plain_student_and_resumes_bit_for_bit(config, middle, last, data, tmp_path):
    cfg = config(data, tmp_path)
    train(cfg, str(tmp_path / 'a'), seed=3)
    whole = torch.load(tmp_path / f'a/{last}.pth', weights_only=False)
    plain = build_model(student_alone(cfg).model, 'student')
    assert list(whole['state_dict']) == list(plain.state_dict())
    state = whole['kd_dense']['distillers']
    judged = [k for k in state if 'discriminator' in k]
    assert any('.optimizer.' in k for k in judged) and any('.module.' in k for k in judged)
    # the host's optimizer has the student and the projectors, not the discriminator
    projectors = [k for k in state if 'projector' in k or '.linear.' in k]
    trained = sum(len(group['params']) for group in whole['optimizer']['param_groups'])
    assert trained == len(list(plain.parameters())) + len(projectors)

    (tmp_path / 'b').mkdir()
    shutil.copy(tmp_path / f'a/{middle}.pth', tmp_path / 'b')
    half = torch.load(tmp_path / f'a/{middle}.pth', weights_only=False)['kd_dense']['distillers']
    assert any(not torch.equal(half[k], state[k]) for k in judged if '.module.' in k)  # it learnt since
    train(cfg, str(tmp_path / 'b'), seed=3, resume=str(tmp_path / f'b/{middle}.pth'))
    resumed = torch.load(tmp_path / f'b/{last}.pth', weights_only=False)
    for a, b in ((whole['state_dict'], resumed['state_dict']), (state, resumed['kd_dense']['distillers'])):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- two processes -----------------------------------------------------------------------------------------------------


def plain_step(data):
    """A step of student, projectors and discriminator in which nothing is drawn and no image sees its neighbours."""
    torch.manual_seed(0)
    norm = dict(type='GN', num_groups=2)
    student = tiny.segmentor(4, dropout_ratio=0.0, norm_cfg=norm)
    student['backbone']['norm_cfg'] = norm
    teacher = build_model(transformers.segmentor('mit'), 'teacher')
    cakd = options(
        'mit',
        replace_prob=0.0,
        linear=dict(dropout=0.0),
        views=False,
        adversary=dict(interval=1, lr_mult=1.0, optimizer=dict(type='SGD')),
        terms=dict(adversarial=1.0),
    )
    model = Distillation(student, teacher, dict(cakd=cakd))
    model.progress = 0.0
    model.train()
    wrapped = model
    if dist.is_initialized():
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=False)
    wrapper = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    for _ in range(2):
        wrapped.train_step(data, wrapper)
        model.distillers.verify_gradients()
        model.distillers.after_step(0.5)
    return {k: v.clone() for k, v in model.distillers.state_dict().items()}


def images(rank=None):
    torch.manual_seed(5)
    data = tiny.segmentation_batch(4)
    return data if rank is None else {k: v[2 * rank : 2 * rank + 2] for k, v in data.items()}


def in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    try:
        torch.save(plain_step(images(rank)), f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason='compares processes on the CPU')
def test_two_processes_train_the_same_discriminator_as_one(tmp_path):
    expected = plain_step(images())
    mp.start_processes(in_a_process, (str(tmp_path),), nprocs=2, start_method='fork')
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert first.keys() == expected.keys() and any('discriminator' in k for k in expected)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=key)
