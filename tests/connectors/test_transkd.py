"""The connectors of TransKD against NumPy in float64, their published sizes and properties."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from torch import nn

from kd_dense.connectors import CSF, EA, PEA, GLMixer, as_grid, as_tokens
from kd_dense.connectors.transkd import ChannelSelection
from kd_dense.context import Context
from kd_dense.distillers import FeatureMimic
from kd_dense.errors import ConfigError
from tests.helpers.toys import nothing_masked, probe

STUDENT, TEACHER = [32, 64, 160, 256], [64, 128, 320, 512]  # SegFormer and PVTv2: B0 and B2


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def array(x):
    return x.detach().double().numpy()


def random_(module):
    """Norms start as the identity, and biases at 0; a test must not."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


# -- references --------------------------------------------------------------------------------------------------------


def conv1x1(x, conv):
    y = np.einsum('oc,bchw->bohw', array(conv.weight)[:, :, 0, 0], x)
    return y if conv.bias is None else y + array(conv.bias)[:, None, None]


def strided(x, conv, kernel, stride, pad):
    """A convolution by its definition."""
    x, weight = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), array(conv.weight)
    h, w = ((n - kernel) // stride + 1 for n in x.shape[2:])
    y = np.zeros((x.shape[0], weight.shape[0], h, w))
    for i in range(h):
        for j in range(w):
            patch = x[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            y[:, :, i, j] = np.einsum('ocyx,bcyx->bo', weight, patch)
    return y if conv.bias is None else y + array(conv.bias)[:, None, None]


def batch_norm(x, norm):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * array(norm.weight)[:, None, None] + array(norm.bias)[:, None, None]


def nearest(x, size):
    for axis, wanted in zip((2, 3), size, strict=True):
        x = x.take(np.floor(np.arange(wanted) * x.shape[axis] / wanted).astype(int), axis)
    return x


def selected(u, y, select):
    s = (u + y).mean((2, 3), keepdims=True)
    z = conv1x1(s, select.fc1) if len(u) == 1 else batch_norm(conv1x1(s, select.fc[0]), select.fc[1])
    w = softmax(np.stack([conv1x1(np.maximum(z, 0), fc) for fc in select.fcs]), axis=0)
    return w[0] * u + w[1] * y


def csf(maps, module):
    outputs, carried = [], None
    for i in reversed(range(len(maps))):
        u = batch_norm(conv1x1(array(maps[i]), module.squeeze[i][0]), module.squeeze[i][1])
        carried = u if carried is None else selected(u, nearest(carried, u.shape[2:]), module.select[i])
        conv, norm = module.expand[i]
        outputs.append(batch_norm(strided(carried, conv, 3, 1, 1), norm))
    return outputs[::-1]


# -- CSF ---------------------------------------------------------------------------------------------------------------


def stages(batch=2, widths=(3, 4, 5), sizes=((9, 13), (5, 7), (3, 4))):
    return [torch.randn(batch, c, *size, dtype=torch.float64) for c, size in zip(widths, sizes, strict=True)]


@pytest.mark.parametrize('batch', [1, 2, 3])
def test_csf_equals_numpy(batch):
    """Sizes as a height and width that 32 does not divide leave them: each half of the one before, rounded up."""
    module, maps = random_(CSF((3, 4, 5), (6, 2, 7), mid_channels=8, reduction=2, min_channels=3)), stages(batch)
    for out, expected in zip(module(maps), csf(maps, module), strict=True):
        np.testing.assert_allclose(array(out), expected, rtol=1e-9, atol=1e-10)


def test_csf_shapes_are_those_of_the_teacher_shallow_to_deep():
    sizes = [(33, 63), (17, 32), (9, 16), (5, 8)]  # of an image of 130 x 250
    outputs = CSF(STUDENT, TEACHER)([torch.randn(2, c, *s) for c, s in zip(STUDENT, sizes)])
    assert [tuple(x.shape) for x in outputs] == [(2, c, *s) for c, s in zip(TEACHER, sizes)]


def test_csf_parameters_equal_the_published_table():
    module = CSF(STUDENT, TEACHER)
    parts = [count(module.squeeze[i], module.expand[i], *module.select[i : i + 1]) for i in (3, 2, 1, 0)]
    assert parts == [312_448, 203_712, 86_592, 47_552]
    assert count(module) == 650_304
    assert module.select[0].fc[0].weight.shape[0] == 32


def test_csf_initial_weights():
    module = CSF([64, 64], [64, 64])
    for conv in (module.squeeze[0][0], module.expand[0][0]):
        bound = math.sqrt(6 / (conv.weight[0].numel() * (1 + 1**2)))  # kaiming, uniform, a = 1
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None


def test_csf_lists_of_different_length():
    with pytest.raises(ConfigError, match=r'CSF: the width lists differ in length: 4 stages .* 3 of the teacher'):
        CSF(STUDENT, TEACHER[:3])


def test_names_do_not_meet_the_custom_keys_of_segformer():
    modules = [CSF([4, 4], [4, 4]), CSF([4, 4], [4, 4], single_sample_branch='shared'), PEA(4, 8), GLMixer(8), EA(3, 4)]
    names = [name for module in modules for name, _ in module.named_parameters()]
    assert len(names) > 40 and not [n for n in names if any(key in n for key in ('norm', 'head', 'pos_block'))]


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('branch', ['fc1', 'shared'])
@pytest.mark.parametrize('batch', [1, 3])
def test_selection_lies_between_its_inputs(batch, branch):
    module = random_(ChannelSelection(6, 4, branch))
    u, y = (torch.randn(batch, 6, 3, 5, dtype=torch.float64) for _ in range(2))
    weights = module.weights(u, y)
    assert weights.shape == (2, batch, 6, 1, 1)
    torch.testing.assert_close(weights.sum(0), torch.ones(batch, 6, 1, 1, dtype=torch.float64))
    assert weights.std() > 0.01  # neither all 1/2
    out = module(u, y)
    assert (out >= torch.minimum(u, y) - 1e-12).all() and (out <= torch.maximum(u, y) + 1e-12).all()
    torch.testing.assert_close(out, weights[0] * u + weights[1] * y)


def test_selection_of_equal_inputs_returns_them():
    module, x = ChannelSelection(6, 4), torch.randn(3, 6, 3, 5)
    assert torch.equal(module(x, x.clone()), x)


@pytest.mark.parametrize('batch, idle', [(1, 'fc'), (2, 'fc1')])
def test_selection_tells_which_branch_is_idle(batch, idle):
    module = ChannelSelection(6, 4)
    u, y = (torch.randn(batch, 6, 3, 5) for _ in range(2))
    module(u, y).square().sum().backward()
    without = {n for n, p in module.named_parameters() if p.grad is None}
    assert without == {n for n, _ in module.named_parameters() if n.split('.')[0] == idle}
    assert {id(p) for p in module.idle_parameters()} == {id(p) for p in module.parameters() if p.grad is None}


@pytest.mark.parametrize('batch', [1, 2])
def test_shared_branch_has_nothing_idle_and_does_not_depend_on_the_batch(batch):
    module = ChannelSelection(6, 4, 'shared')
    u, y = (torch.randn(batch, 6, 3, 5) for _ in range(2))
    out = module(u, y)
    torch.testing.assert_close(out[:1], module(u[:1], y[:1]))
    out.square().sum().backward()
    assert module.idle_parameters() == [] and all(p.grad is not None for p in module.parameters())


def test_selection_unknown_branch():
    with pytest.raises(ConfigError, match="single_sample_branch must be 'fc1' or 'shared', not 'fc2'"):
        ChannelSelection(6, 4, 'fc2')


# -- PEA ---------------------------------------------------------------------------------------------------------------


def test_pea_equals_numpy_token_by_token():
    module, x = PEA(3, 5).double(), torch.randn(2, 7, 3, dtype=torch.float64)
    expected = array(x) @ array(module.weight).T + array(module.bias)
    np.testing.assert_allclose(array(module(x)), expected, rtol=1e-12)
    order = torch.randperm(7)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


def test_pea_parameters_equal_the_published_table():
    parts = [count(PEA(s, t)) for s, t in zip(STUDENT, TEACHER)]
    assert parts == [2_112, 8_320, 51_520, 131_584] and sum(parts) == 193_536


@pytest.mark.parametrize('module', [PEA(8, 5), GLMixer(8, heads=4), GLMixer(8, 5, heads=4)])
def test_maps_are_read_row_by_row(module):
    x = torch.randn(2, 8, 3, 4)
    out = module(x)
    assert out.shape[2:] == (3, 4)
    torch.testing.assert_close(as_tokens(out), module(as_tokens(x)))


def test_tokens_and_grids():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = as_tokens(x)
    assert tokens.shape == (2, 20, 3) and torch.equal(tokens[1, 7], x[1, :, 1, 2])
    assert as_tokens(tokens) is tokens
    assert torch.equal(as_grid(tokens, (4, 5)), x)


# -- GL-Mixer ----------------------------------------------------------------------------------------------------------


def attention(x, module, heads):
    qkv = x @ array(module.qkv.weight).T
    b, n, c = x.shape
    out = np.zeros((b, n, c))
    d = c // heads
    for h in range(heads):
        q, k, v = (qkv[:, :, i * c + h * d : i * c + (h + 1) * d] for i in range(3))
        out[:, :, h * d : (h + 1) * d] = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(d), axis=2) @ v
    return out @ array(module.output.weight).T + array(module.output.bias)


def conv1d(x, conv):
    """Kernel 3 over the tokens ``[B, N, C]``, zeros beyond both ends."""
    padded, weight = np.pad(x, ((0, 0), (1, 1), (0, 0))), array(conv.weight)
    return sum(padded[:, k : k + x.shape[1]] @ weight[:, :, k].T for k in range(3)) + array(conv.bias)


@pytest.mark.parametrize('residual', [False, True])
def test_mixer_equals_numpy(residual):
    module = random_(GLMixer(8, heads=4, gates=(0.7, -0.3), residual=residual))
    with torch.no_grad():
        module.attention_weight.fill_(0.7), module.conv_weight.fill_(-0.3)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    a = array(x)
    expected = 0.7 * attention(a, module, 4) - 0.3 * conv1d(a, module.conv) * expit(conv1d(a, module.gate))
    np.testing.assert_allclose(array(module(x)), expected + a if residual else expected, rtol=1e-9, atol=1e-12)


def test_mixer_gates_start_as_asked():
    assert [p.item() for p in (GLMixer(8).attention_weight, GLMixer(8).conv_weight)] == [1, 1]
    module = GLMixer(8, gates=(0.25, -2))
    assert [module.attention_weight.item(), module.conv_weight.item()] == [0.25, -2]


def test_mixer_parameters_equal_the_published_table():
    module = GLMixer(256)
    assert count(module.qkv, module.output) == 262_400
    assert count(module.conv, module.gate) == 393_728
    assert count(module) == 656_130


def test_mixer_attention_is_equivariant_and_its_convolution_is_not():
    module, x = GLMixer(8).double(), torch.randn(2, 12, 8, dtype=torch.float64)
    order = torch.randperm(12)
    torch.testing.assert_close(module.attention(x[:, order]), module.attention(x)[:, order])
    assert (module.convolution(x[:, order]) - module.convolution(x)[:, order]).abs().max() > 1e-2


def test_mixer_neighbours_cross_the_end_of_a_row():
    module = GLMixer(8)
    x = torch.zeros(1, 8, 2, 4)
    changed = x.clone()
    changed[..., 0, 3] = 1  # the last place of the first row
    difference = (module.convolution(as_tokens(changed)) - module.convolution(as_tokens(x))).abs().sum(2)[0]
    assert [bool(d > 1e-6) for d in difference] == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(heads=3), 'heads: 3 attention heads do not divide the 8 channels'),
        (dict(gates=(0.0, 1.0)), 'gates: needs two numbers other than 0'),
        (dict(gates=(1.0,)), 'gates: needs two numbers'),
    ],
)
def test_mixer_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        GLMixer(8, **options)


# -- EA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stride, kernel, pad', [(4, 7, 3), (2, 3, 1)])
@pytest.mark.parametrize('size', [(8, 12), (9, 5)])
def test_ea_equals_numpy(stride, kernel, pad, size):
    module, x = random_(EA(3, 6, stride)), torch.randn(2, 3, *size, dtype=torch.float64)
    y = strided(array(x), module.projection, kernel, stride, pad)
    assert y.shape[2:] == tuple(math.ceil(n / stride) for n in size)
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    expected = y * array(module.ln.weight)[:, None, None] + array(module.ln.bias)[:, None, None]
    np.testing.assert_allclose(array(module(x)), expected, rtol=1e-9, atol=1e-10)


def test_ea_parameters_equal_the_published_table():
    parts = [count(EA(c, t, s)) for c, t, s in zip([3, *STUDENT], TEACHER, [4, 2, 2, 2])]
    assert parts == [9_600, 37_248, 185_280, 738_816] and sum(parts) + 8 == 970_952


def test_ea_initial_weights():
    module = EA(32, 128)
    assert module.projection.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert module.projection.weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert (module.projection.bias == 0).all() and (module.ln.weight == 1).all() and (module.ln.bias == 0).all()


# -- used alone --------------------------------------------------------------------------------------------------------


def mimic(connector, student, teacher, context=None):
    method = FeatureMimic('x', connector=connector)
    method.setup(*(probe('features', *(tuple(x.shape) for x in side)) for side in (student, teacher)))
    method.double()
    losses = method({'features': student}, {'features': teacher}, context or nothing_masked())
    losses['loss'].backward()
    idle = {id(p) for p in method.idle_parameters()}
    assert all((p.grad is None) == (id(p) in idle) for p in method.parameters())
    return method.connectors, losses['loss'].item()


def doubles(*shapes):
    return [torch.randn(*s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize('connector', ['PEA', dict(type='GLMixer', heads=4), 'EA'])
def test_feature_mimic_with_one_connector_a_level(connector):
    tokens = connector != 'EA'
    student = doubles((2, 12, 8), (2, 6, 4)) if tokens else doubles((2, 8, 6, 8), (2, 4, 5, 3))
    teacher = doubles((2, 12, 5), (2, 6, 7)) if tokens else doubles((2, 5, 3, 4), (2, 7, 3, 2))
    connectors, loss = mimic(connector, student, teacher)
    assert len(connectors) == 2
    expected = [((c(s) - t) ** 2).mean().item() for c, s, t in zip(connectors, student, teacher)]
    assert loss == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize('batch', [1, 2])
def test_feature_mimic_with_csf_joins_the_levels(batch):
    student, teacher = stages(batch), stages(batch, (6, 2, 7))
    connectors, loss = mimic(dict(type='CSF', mid_channels=8), student, teacher)
    assert len(connectors) == 1
    expected = [((o - array(t)) ** 2).mean() for o, t in zip(csf(student, connectors[0]), teacher)]
    assert loss == pytest.approx(np.mean(expected), rel=1e-9)


def test_feature_mimic_with_csf_masks_every_level():
    student, teacher = stages(2), stages(2, (6, 2, 7))
    context = Context(canvas=(36, 52), image_sizes=torch.tensor([[36, 26], [18, 52]]))
    connectors, loss = mimic(dict(type='CSF', mid_channels=8), student, teacher, context)
    expected = []
    for o, t in zip(csf(student, connectors[0]), teacher):
        mask = np.broadcast_to(context.mask(o.shape[2:]).numpy(), o.shape)
        expected.append(((o - array(t)) ** 2)[mask].mean())
    assert loss == pytest.approx(np.mean(expected), rel=1e-9)
