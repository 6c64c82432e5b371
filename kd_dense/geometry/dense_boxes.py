"""The boxes that a dense head predicts, cell by cell, brought into one form whatever the head predicts them by.

That form is the corners ``x1, y1, x2, y2`` as seen from the top left corner of the cell, in strides: it does not depend
on where the cell is, so no grid is needed, and the numbers stay small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_dense.description import Boxes

#: Largest change of a logarithm of the size of an anchor that counts, as in MMDetection's DeltaXYWHBBoxCoder.
_MAX_LOG_RATIO = abs(math.log(16 / 1000))
#: Where there are no anchors: far beyond the size of any image in strides, and far from the overflow of ``exp``.
_MAX_LOG_SIZE = 10.0
#: A corner further away than this many strides, infinity included, counts as being there.
_FAR = 1e5


def anchors_of(boxes: Boxes, level: int, size: float) -> Tensor:
    """``[A, 4]`` anchors of a cell of one level: ``x1, y1, x2, y2`` from its top left corner, in strides.

    Args:
        size: of the square around the point from which boxes are measured, in strides; for heads without anchors.
    """
    if boxes.anchors:
        return torch.tensor(boxes.anchors[level]) / boxes.strides[level]
    low, high = boxes.offset - size / 2, boxes.offset + size / 2
    return torch.tensor([[low, low, high, high]])


def corners(values: Tensor, boxes: Boxes, level: int, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """What the head gives on one level -> corners ``[B, A, 4, h*w]``, from each cell, in strides.

    Args:
        values: ``[B, A, V, h*w]``, or ``[B, A, 4, K, h*w]`` logits of distributions.
        anchors: ``[A, 4]``, see :func:`anchors_of`; for deltas of heads without anchors those of size 1.
        size: ``(h, w)``.
    """
    return _corners(values, boxes, level, anchors, size).clamp(-_FAR, _FAR)


def _corners(values: Tensor, boxes: Boxes, level: int, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    if boxes.kind == 'corners':
        return values - _grid(values, size)
    x1, y1, x2, y2 = anchors.unsqueeze(-1).unbind(1)  # [A, 1] each
    if boxes.kind == 'delta':
        return _from_deltas(values, boxes, (x1, y1, x2, y2))
    if boxes.kind == 'distribution':
        values = expected(values)
    elif boxes.unit == 'pixel':
        values = values / boxes.strides[level]
    left, top, right, bottom = values.unbind(2)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return torch.stack([x - left, y - top, x + right, y + bottom], 2)


def expected(logits: Tensor) -> Tensor:
    """Expected distance of each side, ``[..., K, P] -> [..., P]``, in strides: bin ``k`` stands for ``k`` strides."""
    bins = torch.arange(logits.shape[-2], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-2) * bins[:, None]).sum(-2)


def _from_deltas(deltas: Tensor, boxes: Boxes, anchor: Sequence[Tensor]) -> Tensor:
    x1, y1, x2, y2 = anchor
    dx, dy, dw, dh = (d * std + mean for d, std, mean in zip(deltas.unbind(2), boxes.stds, boxes.means, strict=True))
    limit = _MAX_LOG_RATIO if boxes.anchors else _MAX_LOG_SIZE
    dw, dh = dw.clamp(-limit, limit), dh.clamp(-limit, limit)
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    half_width, half_height = dw.exp() * width / 2, dh.exp() * height / 2
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], 2)


def _grid(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Top left corners of the cells, twice: ``[4, h*w]`` in strides."""
    rows, columns = (torch.arange(n, dtype=values.dtype, device=values.device) for n in size)
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x, y, x, y]).flatten(1)


def grid_anchors(anchors: Tensor, stride: float, size: tuple[int, int]) -> Tensor:
    """Anchors of all cells of a level: ``[A, 4]`` in strides -> ``[h*w, A, 4]`` in pixels of the canvas."""
    return (_grid(anchors, size).T[:, None] + anchors) * stride
