"""The global context block and the generator against NumPy, and their parameter counts."""

import numpy as np
import pytest
import torch

from kd_dense.connectors.generation import Generation
from kd_dense.connectors.global_context import GlobalContext
from tests.helpers.dispatch import Operations


def context_by_hand(block, x, mask=None):
    """``[B, C]``, image by image."""
    where = block.where.weight.detach().numpy()[0, :, 0, 0]
    w1, b1, w2, b2 = (p.detach().numpy() for layer in (block.squeeze, block.expand) for p in (layer.weight, layer.bias))
    gain, shift = block.ln.weight.detach().numpy(), block.ln.bias.detach().numpy()
    out = []
    for b, image in enumerate(x.numpy()):
        counts = np.ones(image.shape[1:], bool) if mask is None else mask[b, 0].numpy()
        cells = image[:, counts]  # [C, n]
        powers = np.exp(where @ cells)
        mean = cells @ (powers / powers.sum())
        hidden = w1 @ mean + b1
        hidden = gain * (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) + shift
        out.append(w2 @ np.maximum(hidden, 0) + b2)
    return np.array(out)


@pytest.mark.parametrize('masked', [False, True])
def test_context_equals_numpy(masked):
    block = GlobalContext(6).double()
    torch.nn.init.normal_(block.expand.bias)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
        mask[1, :, 2:] = False
    value = block(x, mask)
    assert value.shape == (2, 6, 1, 1)
    np.testing.assert_allclose(value.detach()[:, :, 0, 0], context_by_hand(block, x, mask), rtol=1e-10)


def test_no_convolution_of_one_output_channel_runs():
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    with Operations() as operations:
        GlobalContext(6)(x).sum().backward()
    assert not [name for name in operations.counts if 'convolution' in name]


def test_what_lies_outside_does_not_matter_and_an_empty_image_is_finite():
    block = GlobalContext(6)
    x = torch.randn(2, 6, 4, 5)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[0, :, 3:], mask[1] = False, False
    expected = block(x, mask)
    x = torch.where(mask, x, torch.nan).requires_grad_()
    torch.testing.assert_close(block(x, mask), expected)
    block(x, mask).sum().backward()
    assert x.grad.isfinite().all()


def test_context_begins_small_but_every_layer_gets_a_gradient():
    block = GlobalContext(64)
    x = torch.randn(2, 64, 4, 5)
    assert block(x).abs().max() < 0.05
    (block(x) - torch.randn(2, 64, 1, 1)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_map_of_one_cell_leaves_the_choice_of_cells_idle():
    block = GlobalContext(8)
    block(torch.randn(2, 8, 1, 1)).square().sum().backward()
    assert [p.shape for p in block.idle_parameters()] == [block.where.weight.shape]
    assert (block.where.weight.grad == 0).all() and block.squeeze.weight.grad.abs().sum() > 0
    block(torch.randn(2, 8, 1, 2))
    assert block.idle_parameters() == []


def test_parameter_counts():
    c, h = 256, 128
    assert sum(p.numel() for p in GlobalContext(c).parameters()) == c + (c * h + h) + 2 * h + (h * c + c)
    assert sum(p.numel() for p in Generation(c).parameters()) == 2 * (9 * c * c + c)
    assert sum(p.numel() for p in GlobalContext(1).parameters()) == 1 + 2 + 2 + 2  # the narrowest there is


def test_generation_is_two_convolutions_that_keep_the_size():
    generator = Generation(3).double()
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    out = x[0].numpy()
    for layer, last in ((generator[0], False), (generator[2], True)):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        padded = np.pad(out, ((0, 0), (1, 1), (1, 1)))
        out = np.array([[[(weight[o] * padded[:, i : i + 3, j : j + 3]).sum() + bias[o] for j in range(5)]
                         for i in range(4)] for o in range(3)])  # fmt: skip
        out = out if last else np.maximum(out, 0)
    np.testing.assert_allclose(generator(x)[0].detach(), out, rtol=1e-10)
