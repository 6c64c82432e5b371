"""Objects and label maps for batches that stand for real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``[count, 4]`` boxes ``x1, y1, x2, y2`` in pixels, inside of an image of ``size`` ``(H, W)``.

    The square root of the area is 4 % to 60 % of the shorter side, small ones as often as large ones on a logarithmic
    scale; one side is up to twice as long as the other.
    """
    height, width = size
    u = torch.rand(4, count, generator=generator, dtype=torch.float64)
    side = min(size) * 0.04 * (0.6 / 0.04) ** u[0]
    shape = 2 ** (u[1] - 0.5)  # square root of width over height
    extent = torch.stack([side * shape, side / shape], 1)
    corner = u[2:].T * (torch.tensor([width, height], dtype=torch.float64) - extent)
    return torch.cat([corner, corner + extent], 1).float()


def ellipses(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``[n, H, W]`` masks, the ellipse in each of the boxes ``[n, 4]``."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    x1, y1, x2, y2 = boxes.T[..., None]
    across = ((2 * x - x1 - x2) / (x2 - x1).clamp(min=1)).square()
    down = ((2 * y - y1 - y2) / (y2 - y1).clamp(min=1)).square()
    return across[:, None, :] + down[:, :, None] <= 1


def label_map(classes: int, size: tuple[int, int], generator: torch.Generator, ignore_index: int = 255) -> Tensor:
    """``[H, W]`` regions of random classes, an eighth of the image wide; one in sixteen is ignored."""
    regions = torch.randint(0, classes, (8, 8), generator=generator)
    regions[torch.rand(8, 8, generator=generator) < 1 / 16] = ignore_index
    return F.interpolate(regions[None, None].float(), size=size, mode='nearest')[0, 0].long()
