"""Projectors of cross-architecture distillation, and the order of tokens."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kd_dense.connectors.cakd import ConvQKV, GroupwiseLinear, LinearQKV
from kd_dense.connectors.token_layout import TokenLayout, to_grid
from kd_dense.errors import ConfigError
from tests.helpers.toys import resized


def groups_of(module: GroupwiseLinear, grid: tuple[int, int]) -> np.ndarray:
    """Group of every position, found by which layer's bias arrives there."""
    probe = GroupwiseLinear(1, 1, grid, module.mode, module.tile)
    with torch.no_grad():
        probe.weight.zero_()
        probe.bias.copy_(torch.arange(len(probe.bias))[:, None].float())
        return probe(torch.zeros(1, 1, *grid))[0, 0].round().int().numpy()


def looped(module: GroupwiseLinear, x: torch.Tensor, groups: np.ndarray) -> np.ndarray:
    weight, bias, x = (t.detach().double().numpy() for t in (module.weight, module.bias, x))
    out = np.zeros((x.shape[0], weight.shape[1], *x.shape[2:]))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[:, :, i, j] = x[:, :, i, j] @ weight[groups[i, j]].T + bias[groups[i, j]]
    return out


# -- group-wise linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('grid', 'sizes'),
    [
        ((14, 14), [16, 16, 16, 8, 16, 16, 16, 8, 16, 16, 16, 8, 8, 8, 8, 4]),
        ((7, 7), [16, 12, 12, 9]),
        ((3, 2), [6]),  # smaller than a tile
        ((16, 32), [16] * 32),
        ((5, 9), [16, 16, 4, 4, 4, 1]),
    ],
)
def test_tiles_partition_the_tokens(grid, sizes):
    module = GroupwiseLinear(3, 2, grid)
    groups = groups_of(module, grid)
    assert [int((groups == g).sum()) for g in range(len(module.weight))] == sizes
    rows, columns = np.indices(grid)
    assert (groups == rows // 4 * math.ceil(grid[1] / 4) + columns // 4).all()  # row-major, from the top left


def test_number_of_parameters_of_the_paper():
    module = GroupwiseLinear(1024, 768, (14, 14))
    assert sum(p.numel() for p in module.parameters()) == 12_595_200 == 16 * (1024 * 768 + 768)


@pytest.mark.parametrize(('mode', 'grid'), [('tile', (5, 9)), ('grid', (5, 9)), ('grid', (3, 2)), ('shared', (5, 9))])
def test_equals_loops(mode, grid):
    module, x = GroupwiseLinear(3, 2, grid, mode).double(), torch.randn(2, 3, *grid).double()
    torch.testing.assert_close(module(x), torch.tensor(looped(module, x, groups_of(module, grid))))


def test_grid_mode_has_sixteen_layers_whatever_the_size():
    module = GroupwiseLinear(3, 2, mode='grid')
    assert len(module.weight) == 16
    for grid in ((8, 8), (21, 34)):
        assert module(torch.randn(1, 3, *grid)).shape == (1, 2, *grid)
        rows, columns = np.indices(grid)
        expected = rows // math.ceil(grid[0] / 4) * 4 + columns // math.ceil(grid[1] / 4)
        assert (groups_of(module, grid) == expected).all()


def test_one_token_changes_only_itself():
    module, x = GroupwiseLinear(3, 2, (6, 7)), torch.randn(1, 3, 6, 7)
    moved = x.clone()
    moved[..., 4, 5] += 1
    changed = (module(moved) - module(x)).abs().sum((0, 1)) > 0
    assert changed.nonzero().tolist() == [[4, 5]]


def test_permutations_inside_a_tile_commute_and_across_tiles_do_not():
    module, x = GroupwiseLinear(3, 2, (4, 8)), torch.randn(1, 3, 4, 8)

    def swapped(t, a, b):
        t = t.clone()
        t[..., a[0], a[1]], t[..., b[0], b[1]] = t[..., b[0], b[1]].clone(), t[..., a[0], a[1]].clone()
        return t

    inside, across = ((0, 0), (3, 2)), ((0, 0), (0, 5))
    torch.testing.assert_close(module(swapped(x, *inside)), swapped(module(x), *inside))
    assert (module(swapped(x, *across)) - swapped(module(x), *across)).abs().max() > 1e-2


def test_only_the_layer_of_a_touched_tile_gets_a_gradient():
    module = GroupwiseLinear(3, 2, (8, 8))
    module(torch.randn(1, 3, 8, 8))[..., 5, 2].sum().backward()  # second row of tiles, first column
    touched = [g for g in range(4) if module.weight.grad[g].abs().sum() > 0]
    assert touched == [2] == [g for g in range(4) if module.bias.grad[g].abs().sum() > 0]


def test_shared_is_a_1x1_convolution_and_equal_tiles_are_shared():
    shared, x = GroupwiseLinear(3, 2, mode='shared').double(), torch.randn(2, 3, 5, 9).double()
    expected = F.conv2d(x, shared.weight[0][:, :, None, None], shared.bias[0])
    torch.testing.assert_close(shared(x), expected)
    tiles = GroupwiseLinear(3, 2, (5, 9)).double()
    with torch.no_grad():
        tiles.weight.copy_(shared.weight.expand_as(tiles.weight))
        tiles.bias.copy_(shared.bias.expand_as(tiles.bias))
    torch.testing.assert_close(tiles(x), expected)


def test_initialised_like_linear_layers():
    module = GroupwiseLinear(256, 64, (16, 16))
    reference = nn.Linear(256, 64)
    for own, other in ((module.weight, reference.weight), (module.bias, reference.bias)):
        bound = 1 / 16
        assert own.abs().max() <= bound and other.abs().max() <= bound
        assert own.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_dropout_is_on_the_input_and_in_training_only():
    module, x = GroupwiseLinear(64, 2, mode='shared', dropout=0.25), torch.ones(1, 64, 8, 8)
    with torch.no_grad():
        module.weight.fill_(1), module.bias.zero_()
    kept = module(x) * 0.75 / 64
    assert kept.std() > 0 and kept.mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(module.eval()(x), torch.full((1, 2, 8, 8), 64.0))


def test_another_grid_and_wrong_options_are_errors():
    module = GroupwiseLinear(3, 2, (8, 8))
    with pytest.raises(
        ConfigError, match="'tile' has layers for a grid of 8 x 8 tokens, but this batch has 8 x 12; .*'shared'"
    ):
        module(torch.randn(1, 3, 8, 12))
    for options, message in (
        (dict(mode='tiles'), "mode must be one of .*'tile'.* not 'tiles'"),
        (dict(tile=0), 'tile must be a whole number > 0'),
        (dict(dropout=1), 'dropout must lie in 0..1'),
        (dict(grid=None), "mode='tile' needs the grid"),
    ):
        with pytest.raises(ConfigError, match=message):
            GroupwiseLinear(3, 2, **{'grid': (8, 8), **options})


# -- query, key and value ----------------------------------------------------------------------------------------------


def test_conv_qkv_are_three_convolutions_with_their_own_weights():
    module, x = ConvQKV(3, 5).double(), torch.randn(1, 3, 4, 6).double()
    assert sum(p.numel() for p in module.parameters()) == 3 * (9 * 3 * 5 + 5)
    for name, out in zip(('query', 'key', 'value'), module(x), strict=True):
        conv = module[name]
        padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
        weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        cell = (padded[0, :, 2:5, 3:6] * weight).sum((1, 2, 3)) + bias
        torch.testing.assert_close(out[0, :, 2, 3], torch.tensor(cell))
        assert out.shape == (1, 5, 4, 6)


def test_linear_qkv_has_no_bias_and_keeps_the_width():
    module, x = LinearQKV(4).double(), torch.randn(1, 4, 2, 3).double()
    assert [tuple(p.shape) for p in module.parameters()] == [(12, 4, 1, 1)]
    weight = module.qkv.weight.detach()[:, :, 0, 0].numpy()
    for i, out in enumerate(module(x)):
        expected = np.einsum('oc,bchw->bohw', weight[4 * i : 4 * i + 4], x.numpy())
        torch.testing.assert_close(out, torch.tensor(expected))


# -- order of tokens ---------------------------------------------------------------------------------------------------


def test_all_positions_in_rows_behind_class_tokens():
    x = torch.randn(2, 3, 4, 6)
    for extra in (0, 1, 2):
        layout = TokenLayout((4, 6), (2, 5, 24 + extra, 7), (2, 5, 24 + extra, 7), 2)
        assert layout.class_tokens == extra and not layout.is_padded
        tokens = layout.queries(x)
        assert torch.equal(tokens[1, 2 * 6 + 5], x[1, :, 2, 5]) and torch.equal(layout.keys(x), tokens)
        theirs = torch.randn(2, 5, 24 + extra, 7)
        assert torch.equal(layout.places(theirs), theirs[:, :, extra:])


@pytest.mark.parametrize(('grid', 'ratio'), [((4, 6), 2), ((8, 8), 8), ((5, 7), 2), ((16, 32), 4)])
def test_reduced_keys_are_averages(grid, ratio):
    small = grid[0] // ratio, grid[1] // ratio
    layout = TokenLayout(grid, (2, 1, math.prod(grid), 4), (2, 1, math.prod(small), 4), 2)
    assert layout.reduced == small
    x = torch.randn(2, 3, *grid)
    assert layout.queries(x).shape == (2, math.prod(grid), 3) and layout.keys(x).shape == (2, math.prod(small), 3)
    if not (grid[0] % ratio or grid[1] % ratio):
        torch.testing.assert_close(layout.keys(x)[1, -1], x[1, :, -ratio:, -ratio:].mean((1, 2)))


@pytest.mark.parametrize('grid', [(6, 9), (4, 7), (2, 2)])
def test_windows_are_those_of_swin(grid):
    """Against the partition of MMSegmentation itself."""
    from mmseg.models.backbones.swin import ShiftWindowMSA

    x = torch.randn(2, 3, *grid)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -grid[1] % 3, 0, -grid[0] % 3))
    expected = ShiftWindowMSA(3, 1, window_size=3).window_partition(padded).flatten(1, 2)
    shape = (len(expected), 1, 9, 3)
    layout = TokenLayout(grid, shape, shape, 2, windowed=True)
    assert torch.equal(layout.queries(x), expected) and torch.equal(layout.keys(x), expected)
    assert layout.is_padded == (grid != (6, 9))


@pytest.mark.parametrize(
    ('queries', 'keys', 'windowed'),
    [
        ((2, 4, 30, 8), (2, 4, 30, 8), False),  # more than class tokens
        ((2, 4, 20, 8), (2, 4, 20, 8), False),  # another stage
        ((2, 4, 24, 8), (2, 4, 7, 8), False),  # no reduction gives 7
        ((2, 4, 9, 8), (2, 4, 9, 8), True),  # 1 window instead of 2 x 2
    ],
)
def test_numbers_that_do_not_fit_the_grid(queries, keys, windowed):
    with pytest.raises(ConfigError, match=r'1 x \d+ queries and \d+ keys do not fit the 4 x 6 grid .* one stage'):
        TokenLayout((4, 6), queries, keys, 2, windowed)


def test_to_grid():
    x = torch.randn(1, 2, 8, 12)
    assert to_grid(x, (8, 12)) is x
    torch.testing.assert_close(to_grid(x, (4, 6))[0, 1, 2, 3], x[0, 1, 4:6, 6:8].mean())
    torch.testing.assert_close(to_grid(x, (12, 12)), torch.tensor(resized(x.double().numpy(), (12, 12))).float())
