"""Projectors of cross-architecture distillation: from a map of a CNN to matrices and tokens of a transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.errors import ConfigError
from kd_dense.registry import CONNECTORS

#: How :class:`GroupwiseLinear` may divide the grid of tokens.
MODES = ('tile', 'grid', 'shared')


class ConvQKV(nn.ModuleDict):
    """Query, key and value of a map by three convolutions: ``[B, C_in, H, W] ->`` three times ``[B, C_out, H, W]``.

    Source: Liu et al., "Cross-Architecture Knowledge Distillation", equation 1. The bias, the absence of a norm and the
    initialisation (PyTorch's default) are our reading.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(
            {
                name: nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
                for name in ('query', 'key', 'value')
            }
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self['query'](x), self['key'](x), self['value'](x)


class LinearQKV(nn.Module):
    """Query, key and value of a map by one linear layer without bias, in the width of the map.

    ``[B, C, H, W] ->`` three times ``[B, C, H, W]``. Source: the public code of the paper, whose output projection is
    left out: no loss uses it.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).chunk(3, dim=1)


@CONNECTORS.register_module()
class GroupwiseLinear(nn.Module):
    """One fully connected layer per neighbourhood of positions: ``[B, C_in, H, W] -> [B, C_out, H, W]``.

    Source: Liu et al., "Cross-Architecture Knowledge Distillation", equation 5, with the neighbourhoods of the public
    code. Each layer is initialised like an ``nn.Linear``.

    Args:
        grid: ``(H, W)`` of the maps, for ``mode='tile'``.
        mode: ``'tile'``: tiles of ``tile x tile`` positions from the top left, those at the right and bottom edge
            smaller; binds the module to ``grid``, so training needs images of one size. ``'grid'``: ``tile x tile``
            neighbourhoods of equal size, whatever the size of the map. ``'shared'``: one layer for all, which is a 1x1
            convolution.
        tile: 4 in the paper.
        dropout: probability with which an input element is zeroed in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int] | None = None,
        mode: str = 'tile',
        tile: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f'mode must be one of {list(MODES)}, not {mode!r}')
        if not isinstance(tile, int) or tile < 1:
            raise ConfigError(f'tile must be a whole number > 0, not {tile!r}')
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ConfigError(f'dropout must lie in 0..1, 1 excluded, not {dropout!r}')
        if mode == 'tile' and grid is None:
            raise ConfigError("mode='tile' needs the grid of the maps")
        self.mode, self.tile, self.dropout = mode, tile, dropout
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        rows, columns = {
            'tile': (math.ceil(self.grid[0] / tile), math.ceil(self.grid[1] / tile)) if grid else None,
            'grid': (tile, tile),
            'shared': (1, 1),
        }[mode]
        self.groups = rows, columns
        bound = in_channels**-0.5
        self.weight = nn.Parameter(torch.empty(rows * columns, out_channels, in_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(rows * columns, out_channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        if self.mode == 'tile' and (height, width) != self.grid:
            raise ConfigError(
                f"linear.mode: 'tile' has layers for a grid of {self.grid[0]} x {self.grid[1]} tokens, but this batch "
                f"has {height} x {width}; train on crops of one size, or use mode 'grid' or 'shared'"
            )
        x = F.dropout(x, self.dropout, self.training)
        rows, columns = self.groups
        h, w = (self.tile, self.tile) if self.mode == 'tile' else (-(-height // rows), -(-width // columns))
        x = F.pad(x, (0, columns * w - width, 0, rows * h - height))
        x = x.reshape(b, c, rows, h, columns, w).permute(2, 4, 0, 3, 5, 1).reshape(rows * columns, b * h * w, c)
        x = torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))
        x = x.reshape(rows, columns, b, h, w, -1).permute(2, 5, 0, 3, 1, 4)
        return x.reshape(b, -1, rows * h, columns * w)[:, :, :height, :width]

    def extra_repr(self) -> str:
        groups, out_channels, in_channels = self.weight.shape
        return f'{in_channels}, {out_channels}, groups={groups}, mode={self.mode!r}, dropout={self.dropout}'
