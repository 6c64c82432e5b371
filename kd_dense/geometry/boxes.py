"""Ground-truth boxes as maps over the grid of a feature map, in operations whose number does not depend on theirs.

A feature map covers the whole padded canvas, and boxes are in pixels of that canvas: a cell is ``canvas / size`` pixels
high and wide, whatever the true size of an image is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.context import Context
from kd_dense.errors import ConfigError

#: Boxes that one whole number of 64 bits holds in :func:`heaviest`; the sign and the highest bit are left alone.
BITS = 62


def pad_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes of each image ``[n, 4] ->`` all of them ``[B, N, 4]``, and which of those are real, boolean ``[B, N]``.

    ``N`` is the largest number of boxes in an image, at least 1. Only shapes are read, which the host knows.
    """
    most = max([1, *(len(b) for b in boxes)])
    padded = torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b in boxes])
    real = torch.stack([F.pad(b.new_ones(len(b), dtype=torch.bool), (0, most - len(b))) for b in boxes])
    return padded, real


def boxes_of(context: Context, method: str) -> tuple[Tensor, Tensor]:
    """:func:`pad_boxes` of a batch.

    Raises:
        ConfigError: the task has no boxes.
    """
    if context.boxes is None:
        raise ConfigError(f'{method} needs ground-truth boxes, which this task has not; use FeatureMimic or NFD')
    return pad_boxes(context.boxes)


def spans(
    boxes: Tensor, real: Tensor, canvas: tuple[int, int], size: tuple[int, int], overhang: int = 0
) -> tuple[Tensor, Tensor]:
    """Which rows and which columns of cells each box reaches into: boolean ``[B, N, h]`` and ``[B, N, w]``.

    A box covers the cells that it shares an area with; where both its row and its column are true.

    Args:
        boxes, real: see :func:`pad_boxes`.
        canvas: ``(H, W)`` in pixels.
        size: ``(h, w)`` of the feature map.
        overhang: cells by which every box is extended at its right and its bottom.
    """
    (height, width), (h, w) = canvas, size
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows, columns = torch.arange(h, device=boxes.device), torch.arange(w, device=boxes.device)
    return (
        _reaches(y1 * (h / height), y2 * (h / height), rows, overhang) & real[..., None],
        _reaches(x1 * (w / width), x2 * (w / width), columns, overhang) & real[..., None],
    )


def _reaches(low: Tensor, high: Tensor, cells: Tensor, overhang: int) -> Tensor:
    """Cell ``i`` is the interval ``i .. i + 1``."""
    return (cells + 1 > low[..., None]) & (cells < high[..., None] + overhang)


def union(rows: Tensor, columns: Tensor) -> Tensor:
    """Boolean ``[B, 1, h, w]``: the cells that any box covers. Arguments as :func:`spans` returns them."""
    return _outer(rows.float(), columns.float()) > 0


def scale_mask(rows: Tensor, columns: Tensor) -> Tensor:
    """``[B, 1, h, w]``: 1 over the number of cells of the smallest box that covers a cell; 0 where none does.

    So every box weighs 1 in all, whatever its size, and a small box that lies within a large one is not lost.
    Arguments as :func:`spans` returns them.
    """
    areas = (rows.sum(-1) * columns.sum(-1)).clamp(min=1)
    return heaviest(rows, columns, areas.float().reciprocal())


def heaviest(rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """``[B, 1, h, w]``: the largest weight of the boxes that cover a cell, 0 where none does.

    Boxes are bits of whole numbers, from the heaviest in the lowest bit upwards: the lowest bit that the number of a
    row and that of a column have in common names the box. Memory is that of one map for every 62 boxes, not of one map
    for each box.

    Args:
        rows, columns: boolean ``[B, N, h]`` and ``[B, N, w]``, see :func:`spans`.
        weights: ``[B, N]``, > 0.
    """
    weights, order = weights.sort(1, descending=True)
    packed = [_pack(x.gather(1, order[..., None].expand_as(x))) for x in (rows, columns)]
    common = packed[0][..., :, None] & packed[1][..., None, :]  # [B, N / 62, h, w]
    # a power of two is exact in fp32; where there is none the logarithm is minus infinity
    place = (common & -common).float().log2().round().clamp(min=0).long()
    weights = F.pad(weights, (0, -weights.shape[1] % BITS)).unflatten(1, (-1, BITS))
    found = weights.gather(2, place.flatten(2)).view(place.shape)
    return torch.where(common != 0, found, found.new_zeros(())).amax(1, keepdim=True)


def _pack(flags: Tensor) -> Tensor:
    """Boolean ``[B, N, n]`` -> int64 ``[B, ceil(N / 62), n]``, box ``i`` in bit ``i % 62``."""
    flags = F.pad(flags, (0, 0, 0, -flags.shape[1] % BITS)).unflatten(1, (-1, BITS))
    return (flags.long() << torch.arange(BITS, device=flags.device)[:, None]).sum(2)


def gaussians(
    boxes: Tensor, real: Tensor, canvas: tuple[int, int], size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """A bell of height 1 on every box, as a product of a profile over rows ``[B, N, h]`` and one over columns.

    Its centre is that of the box and its standard deviations are ``sigma`` times the height and the width of the box,
    but at least half a cell, so that the smallest boxes are not lost between the centres of cells. All 0 for boxes
    that are not real.

    Args:
        boxes, real, canvas, size: as for :func:`spans`.
        sigma: > 0; with 0.25 the bell has fallen to ``exp(-2)`` in the middle of each edge.

    Returns:
        ``[B, N, h]`` and ``[B, N, w]``.
    """
    (height, width), (h, w) = canvas, size
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows, columns = torch.arange(h, device=boxes.device), torch.arange(w, device=boxes.device)
    return (
        _bell(y1 * (h / height), y2 * (h / height), rows, sigma) * real[..., None],
        _bell(x1 * (w / width), x2 * (w / width), columns, sigma) * real[..., None],
    )


def _bell(low: Tensor, high: Tensor, cells: Tensor, sigma: float) -> Tensor:
    middle, deviation = (low + high)[..., None] / 2, (high - low).mul(sigma).clamp(min=0.5)[..., None]
    return (((cells + 0.5 - middle) / deviation).square() / -2).exp()


def gaussian_sum(rows: Tensor, columns: Tensor) -> Tensor:
    """``[B, 1, h, w]``: sum of the bells, each scaled so that it sums to 1. Arguments: see :func:`gaussians`."""
    tiny = torch.finfo(rows.dtype).tiny
    return _outer(*(x / x.sum(-1, keepdim=True).clamp(min=tiny) for x in (rows, columns)))


def gaussian_union(rows: Tensor, columns: Tensor) -> Tensor:
    """``[B, 1, h, w]`` in 0..1: sum of the bells, capped at 1. Arguments: see :func:`gaussians`."""
    return _outer(rows, columns).clamp(max=1)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """``[B, N, h]``, ``[B, N, w]`` -> ``[B, 1, h, w]``: sum over boxes of the products, never a map for each box."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.transpose(1, 2) @ columns)[:, None]
