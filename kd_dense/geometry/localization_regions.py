"""Where a detector is taught to localise: the regions of localisation distillation, from boxes and anchors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-6
#: Pixels by which the centre of an anchor must lie inside a box.
_MARGIN = 0.01


def localization_regions(
    levels: Sequence[Tensor], boxes: Tensor, valid: Tensor | None = None, nearest: int = 9, share: float = 0.25
) -> tuple[Tensor, Tensor]:
    """The main and the valuable localisation region of one image.

    Of each box, the candidates are the anchors of the ``nearest`` cells of every level, by the distance of the centres,
    and the threshold ``alpha`` is the mean plus the standard deviation of their IoU with it. An anchor belongs

    * to the main region when, for any box, it is a candidate of IoU >= ``alpha`` whose centre lies in the box: the
      positives of ATSS (Zhang et al., CVPR 2020, algorithm 1);
    * to the valuable region when, for any box, ``share * alpha <= DIoU < alpha``, whatever its place and level (Zheng
      et al., "Localization Distillation for Dense Object Detection", CVPR 2022, and its code). It weighs as much as its
      largest IoU with such a box. The same anchor may belong to both.

    Args:
        levels: anchors of each level, ``[h*w, A, 4]`` in pixels; those of one cell share their centre.
        boxes: ``[n, 4]`` ``x1, y1, x2, y2`` in pixels.
        valid: boolean ``[h*w]`` of each level in one tensor, cells that count; all of them when ``None``.
        nearest: cells.
        share: ``alpha_vl / alpha_pos``, 0..1.

    Returns:
        For all anchors, level by level and cell by cell: boolean ``[N]``, and weights ``[N]`` >= 0.
    """
    anchors = torch.cat([level.flatten(0, 1) for level in levels])
    if len(boxes) == 0:
        return anchors.new_zeros(len(anchors), dtype=torch.bool), anchors.new_zeros(len(anchors))
    boxes = boxes.to(anchors.dtype)
    iou, diou = overlaps(boxes, anchors)
    candidates = _nearest(levels, boxes, valid, nearest)
    count = candidates.sum(1, keepdim=True)
    mean = (iou * candidates).sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((iou - mean).square() * candidates).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    threshold = mean + variance.sqrt()
    main = (candidates & (iou >= threshold) & _centred_inside(anchors, boxes)).any(0)
    valuable = (diou < threshold) & (diou >= share * threshold)
    if valid is not None:
        valuable = valuable & torch.cat(
            [v[:, None].expand(-1, level.shape[1]).flatten() for v, level in _by_level(valid, levels)]
        )
    return main, (iou * valuable).amax(0)


def overlaps(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and DIoU (Zheng et al., AAAI 2020) of ``[n, 4]`` with ``[N, 4]``: ``[n, N]`` each.

    ``DIoU = IoU - d^2 / c^2``: ``d`` the distance of the centres, ``c`` the diagonal of the smallest box around both.
    """
    # one coordinate after the other: tensors of [n, N], not of [n, N, 2]
    shared_x, hull_x, apart_x = _along(*boxes[:, 0::2, None].unbind(1), *anchors[:, 0::2].unbind(1))
    shared_y, hull_y, apart_y = _along(*boxes[:, 1::2, None].unbind(1), *anchors[:, 1::2].unbind(1))
    inter = shared_x * shared_y
    iou = inter / (_areas(boxes)[:, None] + _areas(anchors) - inter).clamp(min=_EPS)
    return iou, iou - (apart_x.square() + apart_y.square()) / (hull_x.square() + hull_y.square()).clamp(min=_EPS)


def _along(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of two intervals: the length that they share, that of the smallest one around both, the way between middles."""
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0)
    hull = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    return shared, hull, (low + high - other_low - other_high) / 2


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _nearest(levels: Sequence[Tensor], boxes: Tensor, valid: Tensor | None, nearest: int) -> Tensor:
    """Boolean ``[n, N]``: the anchors of the ``nearest`` valid cells of each level."""
    middles = _centres(boxes)[:, None]
    found = []
    for usable, level in _by_level(valid, levels):
        distances = (_centres(level[:, 0]) - middles).square().sum(-1)
        if usable is not None:
            distances = distances.masked_fill(~usable, float('inf'))
        closest = distances.topk(min(nearest, len(level)), dim=1, largest=False).indices
        chosen = torch.zeros_like(distances, dtype=torch.bool).scatter_(1, closest, True)
        if usable is not None:  # fewer valid cells than asked for
            chosen = chosen & usable
        found.append(chosen[..., None].expand(-1, -1, level.shape[1]).flatten(1))
    return torch.cat(found, 1)


def _by_level(valid: Tensor | None, levels: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    parts = [None] * len(levels) if valid is None else valid.split([len(level) for level in levels])
    return list(zip(parts, levels, strict=True))


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _centred_inside(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Boolean ``[n, N]``: does the centre of each anchor lie inside each box?"""
    x, y = _centres(anchors).unbind(1)
    x1, y1, x2, y2 = boxes[..., None].unbind(1)
    return (x - x1 > _MARGIN) & (y - y1 > _MARGIN) & (x2 - x > _MARGIN) & (y2 - y > _MARGIN)
