"""TinyViT: the published numbers of parameters, shapes, padding, and use in the toolboxes."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope

from kd_dense import ConfigError, TinyViT
from kd_dense.models.build import build_model
from kd_dense.models.tinyvit import _ConvBlock, _WindowAttention
from tests.helpers import tiny


@pytest.mark.parametrize(
    'arch, backbone, classifier',
    [
        ('5m', 5_071_764, 5_392_764),
        ('11m', 10_547_972, 10_996_972),
        ('21m', 20_621_568, 21_198_568),
        ('21m-384', None, 21_230_488),
    ],
)
def test_parameters__are_as_many_as_published(arch, backbone, classifier):
    with torch.device('meta'):
        model = TinyViT(arch)
        head = torch.nn.Linear(model.norm.normalized_shape[0], 1000)
    found = sum(p.numel() for p in model.parameters())
    assert backbone is None or found == backbone
    assert found + sum(p.numel() for p in head.parameters()) == classifier


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return TinyViT('5m', drop_path_rate=0.5).eval()


@pytest.mark.parametrize('size', [(64, 64), (70, 101)])
def test_maps__have_strides_4_to_32(model, size):
    with torch.no_grad():
        maps = model(torch.randn(2, 3, *size))
    expected = [(2, d, -(-size[0] // s), -(-size[1] // s)) for d, s in ((64, 4), (128, 8), (160, 16), (320, 32))]
    assert [tuple(m.shape) for m in maps] == expected
    assert all(m.isfinite().all() for m in maps)


def test_attention__is_that_of_a_map_padded_with_zeros():
    """Against loops in float64: two windows of 3 x 3 on a map of 3 x 5."""
    torch.manual_seed(0)
    attention = _WindowAttention(64, 3).double()
    torch.nn.init.normal_(attention.attention_biases)
    torch.nn.init.normal_(attention.norm.bias)
    x = torch.randn(1, 64, 3, 5, dtype=torch.float64)
    padded = torch.zeros(1, 64, 3, 6, dtype=torch.float64)
    padded[..., :5] = x
    expected = torch.empty(64, 3, 6, dtype=torch.float64)
    places = [(i, j) for i in range(3) for j in range(3)]
    for left in (0, 3):
        tokens = torch.stack([padded[0, :, i, left + j] for i, j in places])
        q, k, v = F.linear(attention.norm(tokens), attention.qkv.weight, attention.qkv.bias).split(64, 1)
        heads = []
        for h in range(2):
            part = slice(32 * h, 32 * h + 32)
            scores = q[:, part] @ k[:, part].T / 32**0.5
            for a, (y, x_) in enumerate(places):
                for b, (y2, x2) in enumerate(places):
                    scores[a, b] += attention.attention_biases[h, abs(y - y2) * 3 + abs(x_ - x2)]
            heads.append(scores.softmax(1) @ v[:, part])
        result = F.linear(torch.cat(heads, 1), attention.proj.weight, attention.proj.bias)
        for token, (i, j) in zip(result, places, strict=True):
            expected[:, i, left + j] = token
    assert torch.allclose(attention(x)[0], expected[..., :5], atol=1e-10)


def test_drop_path__draws_in_training_only(model):
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images)[-1], model(images)[-1])
        block = model.stages[3][1].train()
        x = torch.randn(8, 320, 2, 2)
        different = not torch.equal(block(x), block(x))
        block.eval()
    assert different
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage]
    assert rates == pytest.approx(torch.linspace(0, 0.5, 12).tolist())


def test_beginning(model):
    block = _ConvBlock(8, 0.0, dict(type='BN')).eval()
    fresh = TinyViT('5m')
    assert fresh.stages[0][0].project.norm.weight.abs().max() == 0  # so the branch adds nothing
    assert block(torch.ones(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    linear = [m for m in fresh.modules() if isinstance(m, torch.nn.Linear)]
    assert all(0.015 < m.weight.std() < 0.025 and m.bias.abs().max() == 0 for m in linear)
    assert all(not p.any() for name, p in fresh.named_parameters() if name.endswith('attention_biases'))


def test_pool_before_norm__is_the_norm_of_the_mean(model):
    other = TinyViT('5m', out_indices=(2, 3), pool_before_norm=True).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    images, seen = torch.randn(1, 3, 64, 64), []
    handle = other.stages[3].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        maps = other(images)
        expected = F.layer_norm(seen[0].mean((2, 3)), (320,))
    handle.remove()
    assert maps[1].shape == (1, 320, 1, 1) and torch.allclose(maps[1].flatten(1), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(maps[0], model(images)[2], atol=1e-6)


def test_out_indices__run_no_further_than_needed(model):
    short = TinyViT('5m', out_indices=(1,)).eval()
    calls = []
    short.stages[2].register_forward_hook(lambda *_: calls.append(1))
    (found,) = short(torch.randn(1, 3, 32, 32))
    assert found.shape == (1, 128, 4, 4) and not calls


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (dict(arch='5M'), r"backbone\.arch: unknown '5M'; did you mean '5m'"),
        (dict(out_indices=(3, 1)), r'backbone\.out_indices: must be rising stages of 0 to 3'),
        (dict(out_indices=(4,)), r'backbone\.out_indices'),
        (dict(drop_path_rate=1.0), r'backbone\.drop_path_rate: must be at least 0 and below 1'),
    ],
)
def test_what_can_not_work__is_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TinyViT(**arguments)


def test_as_backbone_of_a_segmentor__every_parameter_gets_a_gradient():
    config = tiny.segmentor()
    config['backbone'] = dict(type='kd_dense.TinyViT', arch='5m')
    config['decode_head']['in_channels'] = [64, 128, 160, 320]
    torch.manual_seed(0)
    model = build_model(config, 'student').train()
    losses = model(**model.data_preprocessor(tiny.segmentation_batch(), True), mode='loss')
    model.parse_losses(losses)[0].backward()
    assert [
        name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_as_backbone_of_a_detector__is_found_by_its_name():
    config = tiny.detector('GFL')
    config['backbone'] = dict(type='kd_dense.TinyViT', arch='5m', out_indices=(1, 2, 3))
    config['neck'].update(in_channels=[128, 160, 320], start_level=0)
    model = build_model(config, 'student').eval()
    with torch.no_grad():
        levels = model.extract_feat(torch.randn(1, 3, 96, 128))
    assert [tuple(x.shape[2:]) for x in levels[:3]] == [(12, 16), (6, 8), (3, 4)]
    init_default_scope('mmdet')
    assert isinstance(MODELS.build(dict(type='kd_dense.TinyViT')), TinyViT)
