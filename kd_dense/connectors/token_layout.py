"""Brings a map into the order in which a transformer's attention has its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd_dense.errors import ConfigError


def to_grid(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the student's map ``[B, C, h, w]`` to the teacher's grid: averages of its cells, or bilinear upwards."""
    size = int(size[0]), int(size[1])
    if tuple(x.shape[-2:]) == size:
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


class TokenLayout:
    """Where the tokens of one attention module lie on the ``H x W`` grid of its stage.

    Three layouts are told apart by the numbers of tokens alone:

    * all positions in rows, behind class tokens where there are any (ViT, MiT, PVT);
    * the same for the queries, and a coarser grid ``H // r x W // r`` for keys and values (MiT and PVT with a
      reduction ``r``);
    * windows of ``w x w`` positions, each for itself, on a grid padded at the bottom and the right (Swin).

    Args:
        grid: ``(H, W)``.
        queries, keys: shapes ``[B', h, N, d]`` and ``[B', h, M, d]``.
        batch: images ``B``; windows make ``B'`` a multiple of it.
        windowed: tokens are in windows.

    Raises:
        ConfigError: numbers of tokens that do not fit the grid.
    """

    def __init__(
        self, grid: Sequence[int], queries: Sequence[int], keys: Sequence[int], batch: int, windowed: bool = False
    ) -> None:
        self.grid = height, width = int(grid[0]), int(grid[1])
        count, key_count = queries[-2], keys[-2]
        misfit = ConfigError(
            f'attention: {queries[0] // batch} x {count} queries and {key_count} keys do not fit the {height} x '
            f'{width} grid of the map that the teacher gives; tap attention and map of one stage'
        )
        self.window = self.class_tokens = 0
        self.reduced = self.grid
        if windowed:
            self.window = math.isqrt(count)
            if queries[0] != batch * math.prod(math.ceil(n / self.window) for n in self.grid):
                raise misfit
            return
        if key_count == count:
            self.class_tokens = count - height * width
            if not 0 <= self.class_tokens <= 2:  # a class token, and the distillation token of DeiT
                raise misfit
        else:
            ratio = next((r for r in range(2, max(grid) + 1) if (height // r) * (width // r) == key_count), None)
            if ratio is None or count != height * width:
                raise misfit
            self.reduced = height // ratio, width // ratio

    @property
    def is_padded(self) -> bool:
        """Do some windows reach beyond the grid?"""
        return bool(self.window) and any(n % self.window for n in self.grid)

    def queries(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B', N, C]``, without class tokens; 0 where windows reach beyond the grid."""
        if not self.window:
            return x.flatten(2).transpose(1, 2)
        w, (height, width) = self.window, self.grid
        x = F.pad(x, (0, -width % w, 0, -height % w))
        b, c, height, width = x.shape
        x = x.reshape(b, c, height // w, w, width // w, w).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(-1, w * w, c)

    def keys(self, x: Tensor) -> Tensor:
        """The same for keys and values: ``[B, C, H, W] -> [B', M, C]``, averaged where the teacher reduces them."""
        return self.queries(to_grid(x, self.reduced)) if self.reduced != self.grid else self.queries(x)

    def places(self, tokens: Tensor) -> Tensor:
        """The teacher's ``[B', h, N, d]`` without its class tokens, which have no place in the image."""
        return tokens[:, :, self.class_tokens :]
