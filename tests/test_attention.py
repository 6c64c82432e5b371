"""Query, key and value of real attention modules: put together again they give what the module returns."""

import pytest
import torch
from mmseg.models.backbones.mit import EfficientMultiheadAttention
from mmseg.models.backbones.swin import ShiftWindowMSA, WindowMSA
from torch import nn

from kd_dense.attention import is_attention, qkv
from kd_dense.errors import ConfigError
from kd_dense.losses.cakd import attend
from kd_dense.taps import Taps
from tests.helpers import transformers


def together(parts, projection):
    """Attention outputs of all heads side by side, through the output projection."""
    out = attend(*parts)
    return projection(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_multihead_attention_of_torch(batch_first, bias):
    module = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).eval()
    if bias:
        nn.init.normal_(module.in_proj_bias)
    query, memory = torch.randn(2, 7, 12), torch.randn(2, 4, 12)
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, memory, memory)]
    expected, _ = module(*inputs)
    expected = expected if batch_first else expected.transpose(0, 1)
    parts = qkv(module, tuple(inputs), {})
    assert [tuple(x.shape) for x in parts] == [(2, 3, 7, 4), (2, 3, 4, 4), (2, 3, 4, 4)]
    torch.testing.assert_close(together(parts, module.out_proj), expected)
    by_name = qkv(module, (), dict(zip(('query', 'key', 'value'), inputs, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(parts, by_name, strict=True))


def test_multihead_attention_with_memory_of_another_width():
    module = nn.MultiheadAttention(12, 3, kdim=5, vdim=6, batch_first=True).eval()
    inputs = torch.randn(2, 7, 12), torch.randn(2, 4, 5), torch.randn(2, 4, 6)
    torch.testing.assert_close(together(qkv(module, inputs, {}), module.out_proj), module(*inputs)[0])


@pytest.mark.parametrize('ratio', [1, 2])
def test_attention_of_mit(ratio):
    module = EfficientMultiheadAttention(8, 2, qkv_bias=True, sr_ratio=ratio).eval()
    x = torch.randn(2, 24, 8)
    taps = Taps(module, ['attn@qkv', 'attn:0'])
    with taps.record():
        module(x, (4, 6), identity=torch.zeros_like(x))
    taken = taps.take()
    parts = taken['attn@qkv']
    assert parts[1].shape == (2, 2, 24 // ratio**2, 4)
    (returned,) = taken['attn:0']  # both views of one call
    torch.testing.assert_close(together(parts, module.attn.out_proj), returned.transpose(0, 1))


def test_window_attention_of_swin():
    module = WindowMSA(8, 2, (3, 3)).eval()
    nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(4, 9, 8)
    parts = qkv(module, (x,), {})
    assert [tuple(p.shape) for p in parts] == [(4, 2, 9, 4)] * 3 + [(1, 2, 9, 9)]
    torch.testing.assert_close(together(parts, module.proj), module(x))


def test_shifted_windows_and_masks_are_refused():
    shifted = ShiftWindowMSA(8, 2, window_size=3, shift_size=1).eval()
    taps = Taps(shifted, ['w_msa@qkv'], key='teacher')
    with (
        pytest.raises(ConfigError, match="teacher: tap 'w_msa@qkv': .* shifts its windows; .* even index"),
        taps.record(),
    ):
        shifted(torch.randn(1, 36, 8), (6, 6))
    module, x = nn.MultiheadAttention(8, 2), torch.randn(5, 1, 8)
    with pytest.raises(ConfigError, match='masked'):
        qkv(module, (x, x, x), dict(attn_mask=torch.zeros(5, 5, dtype=torch.bool)))


def test_the_gradient_flows_where_it_is_asked_for():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 5, 8, requires_grad=True)
    sum(part.square().sum() for part in qkv(module, (x, x, x), {})).backward()
    assert x.grad.abs().sum() > 0 and module.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize('kind', transformers.ATTENTION)
def test_taps_of_real_backbones(kind):
    from kd_dense.models.build import build_model

    model = build_model(transformers.segmentor(kind), 'model').eval()
    path = transformers.ATTENTION[kind]
    assert is_attention(model.get_submodule(path))
    taps = Taps(model, [f'{path}@qkv', path])
    with torch.no_grad(), taps.record():
        model.extract_feat(torch.randn(2, 3, 64, 64))
    parts = taps.take()[f'{path}@qkv']
    q = {'mit': (2, 8, 4, 4), 'swin': (2, 4, 9, 8), 'vit': (2, 4, 17, 8)}[kind]
    assert [tuple(p.shape) for p in parts[:3]] == [q] * 3 and len(parts) == (4 if kind == 'swin' else 3)
    # the deepest tap still ends the forward
    again = Taps(model, [f'{path}@qkv'])
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        with torch.no_grad():
            again.run_until_deepest(lambda: model.extract_feat(torch.randn(2, 3, 64, 64)), key=2)
        again.take()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('attn@qvk', "there is no view 'qvk'; did you mean 'qkv'"),
        ('sr@qkv', "tap 'sr@qkv': sr is a Conv2d without qkv; .*'?attn"),
        ('atn@qkv', "no module 'atn'; did you mean .*'attn'"),
    ],
)
def test_wrong_names(name, message):
    module = EfficientMultiheadAttention(8, 2, sr_ratio=2)
    with pytest.raises(ConfigError, match=message):
        Taps(module, [name])
