"""Pooled embeddings: one vector for each box, class, cell or image of a batch.

What is pooled of the student and of the teacher goes together row by row, so both are given the same boxes, labels and
masks. Only shapes are read, which the host knows: nothing is copied from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.geometry.boxes import pad_boxes
from kd_dense.losses.reduction import at_least_fp32, zero_outside

#: RoIAlign's 7 x 7 bins of 2 x 2 samples each.
_SAMPLES = 14
#: A box of this side is pooled from the map of stride 16.
_CANONICAL = 224, 4


def roi_tokens(
    levels: Sequence[Tensor], boxes: Sequence[Tensor], octaves: Sequence[int], canvas: tuple[int, int]
) -> list[Tensor]:
    """The mean feature inside each box, from the level that fits its size.

    A box of area ``a`` is pooled from the map of stride ``2^k``, ``k = floor(4 + log2(sqrt(a) / 224))``, or from the
    nearest stride that there is (Lin et al., "Feature Pyramid Networks", CVPR 2017, equation 1).

    The value is that of RoIAlign (``aligned``, 7 x 7 bins of 2 x 2 samples) averaged over its bins, up to rounding.
    The average is a separable one, a product of a profile over rows and one over columns, so all boxes of an image are
    pooled by one matrix product. Unlike RoIAlign its gradient is deterministic on every device.

    Args:
        levels: maps ``[B, C, h, w]`` of equal ``C``.
        boxes: per image ``[n, 4]``, ``x1, y1, x2, y2`` in pixels of the canvas.
        octaves: ``k`` of each level: the logarithm of its stride to base 2. No two alike.
        canvas: ``(H, W)`` in pixels.

    Returns:
        Per image ``[n, C]``, in fp32 or better.
    """
    padded, _ = pad_boxes(boxes)
    padded = padded.to(at_least_fp32(levels[0]).dtype)
    wanted = _octave(padded)
    pooled = 0
    for x, (low, high) in zip(levels, _ranges(octaves), strict=True):
        x = at_least_fp32(x)
        h, w = x.shape[2:]
        rows = _profile(padded[..., 1::2] * (h / canvas[0]), h)
        columns = _profile(padded[..., 0::2] * (w / canvas[1]), w)
        rows = zero_outside(rows, ((wanted >= low) & (wanted < high))[..., None])
        weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)  # [B, n, h w]
        with torch.autocast(x.device.type, enabled=False):
            pooled = pooled + weights @ x.flatten(2).transpose(1, 2)
    return [tokens[: len(own)] for tokens, own in zip(pooled, boxes, strict=True)]


def _octave(boxes: Tensor) -> Tensor:
    """``[..., 4] -> [...]``: the base-2 logarithm of the stride of the map that a box is to be pooled from."""
    side, octave = _CANONICAL
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1).clamp(min=1e-6)
    return (octave + (area.sqrt() / side).log2()).floor()


def _ranges(octaves: Sequence[int]) -> list[tuple[float, float]]:
    """For each level the octaves that it serves, from one up to another that it does not serve."""
    ascending = sorted(octaves)
    lows = {octave: octave if i else -math.inf for i, octave in enumerate(ascending)}
    highs = dict(zip(ascending, [*ascending[1:], math.inf], strict=True))
    return [(lows[octave], highs[octave]) for octave in octaves]


def _profile(ends: Tensor, cells: int) -> Tensor:
    """How much each of ``cells`` weighs in the mean of the samples between two ends: ``[..., 2] -> [..., cells]``.

    Samples are interpolated linearly between the centres of cells; up to one cell beyond the outermost centre they take
    its value, further out they are 0, as in RoIAlign.
    """
    low, high = (ends - 0.5)[..., None].unbind(-2)
    steps = (torch.arange(_SAMPLES, device=ends.device, dtype=ends.dtype) + 0.5) / _SAMPLES
    samples = (low + (high - low) * steps)[..., None]
    hat = 1 - (samples.clamp(0, cells - 1) - torch.arange(cells, device=ends.device)).abs()
    return zero_outside(hat.clamp(min=0), (samples >= -1) & (samples <= cells)).mean(-2)


def class_tokens(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each class of each image, over the cells whose centre pixel has that label.

    Args:
        x: ``[B, C, h, w]``.
        labels: ``[B, H, W]`` label map of any size; labels from ``classes`` upwards belong to no class.
        classes: ``K``.

    Returns:
        ``[B, K, C]``, and boolean ``[B, K]``: is the class present? Where it is not its token is 0.
    """
    x, labels = at_least_fp32(x), labels[:, None]
    if labels.shape[-2:] != x.shape[-2:]:
        # nearest-exact samples the pixel under the centre of each cell; it needs a floating type
        labels = F.interpolate(labels.float(), size=x.shape[-2:], mode='nearest-exact')
    members = (labels == torch.arange(classes, device=x.device)[:, None, None]).flatten(2).to(x.dtype)
    counts = members.sum(-1)
    with torch.autocast(x.device.type, enabled=False):
        sums = members @ x.flatten(2).transpose(1, 2)
    return sums / counts[..., None].clamp(min=1), counts > 0


def grid_tokens(x: Tensor, cells: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The mean feature of each cell of a ``cells x cells`` grid, or of the map's own cells where it has fewer.

    Args:
        x: ``[B, C, h, w]``.
        mask: boolean ``[B, 1, h, w]``, positions that count.

    Returns:
        ``[B, N, C]`` row by row, and boolean ``[B, N]``: has the cell any position that counts? ``None``: all have.
    """
    size = tuple(min(cells, n) for n in x.shape[2:])
    pooled, valid = F.adaptive_avg_pool2d(zero_outside(at_least_fp32(x), mask), size), None
    if mask is not None:
        share = F.adaptive_avg_pool2d(mask.to(pooled.dtype), size)
        valid = share > 0
        pooled, valid = pooled / share.where(valid, 1.0), valid.flatten(1)
    return pooled.flatten(2).transpose(1, 2), valid


def image_tokens(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean feature of each image over the positions that count.

    Args:
        x: ``[B, C, h, w]``.
        mask: boolean ``[B, 1, h, w]``, positions that count.

    Returns:
        ``[B, C]``, and boolean ``[B]``: does any position of the image count? Where none does its token is 0.
    """
    x = at_least_fp32(x)
    if mask is None:
        return x.mean((2, 3)), x.new_ones(len(x), dtype=torch.bool)
    counts = mask.sum((2, 3))
    return zero_outside(x, mask).sum((2, 3)) / counts.clamp(min=1), counts[:, 0] > 0
