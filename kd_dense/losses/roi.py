"""Losses between the predictions of two RoI heads for the same regions, and the boxes behind them.

``R`` regions of all images together. Every loss is a sum over regions divided by their number, as the losses of RoI
heads are, and exactly 0 when there are none. Gradients go to the student only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.queries import giou
from kd_dense.losses.reduction import at_least_fp32, prepare, zero_outside

#: Largest logarithm of the ratio of the sizes of a box and its region that :func:`decode` follows; MMDetection's limit.
LARGEST = math.log(1000 / 16)


def roi_class_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    background_weight: float = 1.0,
    weight_terms: bool = False,
) -> Tensor:
    """``T^2 / R * sum_r w_r KL(p_r || q_r)``, softmax at temperature ``T``, the background weighted differently.

    ``w_r = 1 + (background_weight - 1) p_r,bg``, ``p`` at ``T = 1``: what class weights of 1 and of
    ``background_weight`` are for the teacher on average. It is smallest, and 0, where the student agrees.

    Args:
        student, teacher: logits ``[R, K + 1]``, the background last.
        weight_terms: weight the terms of each sum instead, ``T^2 / R * sum_r sum_c w_c p_rc (log p_rc - log q_rc)``:
            the class-weighted cross-entropy with soft labels, less its value for ``q = p``. Its minimum lies at
            ``q ~ w p``, not at ``q = p``, and below 0.
    """
    student, teacher = prepare(student, teacher)
    log_q, log_p = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    terms = F.kl_div(log_q, log_p, reduction='none', log_target=True)
    if weight_terms:
        total = terms.sum() + (background_weight - 1) * terms[:, -1].sum()
    else:
        weights = 1 + (background_weight - 1) * teacher.softmax(1)[:, -1]
        total = (terms.sum(1) * weights).sum()
    return total * temperature**2 / max(1, len(student))


def roi_l1(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """``1 / R * sum_r w_r |S_r - T_r|_1``.

    Args:
        student, teacher: ``[R, 4]`` box deltas in the same units.
        weights: ``[R]``, a constant.
    """
    student, teacher = prepare(student, teacher)
    return ((student - teacher).abs().sum(1) * at_least_fp32(weights.detach())).sum() / max(1, len(student))


def roi_giou(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """``1 / R * sum_r w_r (1 - GIoU(S_r, T_r))`` of boxes ``[R, 4]``, each term 0..2; Rezatofighi et al., CVPR 2019."""
    student, teacher = prepare(student, teacher)
    return ((1 - giou(student, teacher)) * at_least_fp32(weights.detach())).sum() / max(1, len(student))


def bounded_regression(
    student: Tensor, teacher: Tensor, target: Tensor, positive: Tensor, margin: float = 0.0
) -> Tensor:
    """``1 / R * sum over positives of |S - Y|_2^2 where |S - Y|_2^2 + m > |T - Y|_2^2``, else 0.

    The teacher is no target but a bound: the student is pulled to the ground truth for as long as it is not better
    than the teacher by the margin.

    Args:
        student, teacher, target: ``[R, 4]`` box deltas in the same units.
        positive: boolean ``[R]``; ``target`` has a meaning where it is true.
        margin: ``m``, in squared units of the deltas.
    """
    student, teacher = prepare(student, teacher)
    own, bound = (
        zero_outside(x - at_least_fp32(target.detach()), positive[:, None]).square().sum(1) for x in (student, teacher)
    )
    return zero_outside(own, positive & (own + margin > bound)).sum() / max(1, len(student))


def mask_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * mean over regions and pixels of KL(Bernoulli(p) || Bernoulli(q))``, sigmoid at temperature ``T``.

    Args:
        student, teacher: mask logits ``[P, 1, h, w]``, of one class for each region.
    """
    s, t = (x / temperature for x in prepare(student, teacher))
    kl = t.sigmoid() * (t - s) - F.softplus(t) + F.softplus(s)  # see bernoulli_kl
    return kl.sum() * temperature**2 / max(1, kl.numel())


def of_class(predictions: Tensor, labels: Tensor, agnostic: bool = False, size: int = 1) -> Tensor:
    """What is predicted for one class of each region: ``[R, K * size, ...] -> [R, size, ...]``.

    Args:
        labels: ``[R]`` class indices.
        agnostic: there is one prediction for all classes, ``[R, size, ...]``.
        size: numbers per class: 4 of box deltas, 1 mask.
    """
    if agnostic:
        return predictions
    by_class = predictions.unflatten(1, (-1, size))
    index = labels.view(-1, *[1] * (by_class.dim() - 1)).expand(-1, 1, *by_class.shape[2:])
    return by_class.gather(1, index).squeeze(1)


def encode(rois: Tensor, boxes: Tensor) -> Tensor:
    """Boxes ``[R, 4]`` relative to regions ``[R, 4]``: ``(x - x_R) / w_R``, ``(y - y_R) / h_R``, logarithms of size.

    ``x, y`` are centres (Girshick et al., CVPR 2014, appendix C). Sizes of 0 count as the smallest number.
    """
    (centre, size), (centre_r, size_r) = _centred(boxes), _centred(rois)
    return torch.cat([(centre - centre_r) / size_r, (size / size_r).log()], 1)


def decode(rois: Tensor, deltas: Tensor) -> Tensor:
    """The boxes ``[R, 4]`` that ``deltas`` ``[R, 4]`` mean; the inverse of :func:`encode`. They are not clipped."""
    centre_r, size_r = _centred(rois)
    centre = centre_r + deltas[:, :2] * size_r
    half = size_r * deltas[:, 2:].clamp(-LARGEST, LARGEST).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[:, :2], boxes[:, 2:]
    return (low + high) / 2, (high - low).clamp(min=torch.finfo(boxes.dtype).eps)


def matched_objects(rois: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The object that each region overlaps most, among those of its image.

    Args:
        rois: ``[R, 5]`` index of the image and ``x1, y1, x2, y2``.
        boxes, labels: of the objects of each image, ``[n, 4]`` and ``[n]``.

    Returns:
        Box ``[R, 4]``, class ``[R]`` and IoU ``[R]`` of that object. IoU -1: the image has none.
    """
    # one more that belongs to no image, so that there is always one
    everything = torch.cat([*boxes, rois.new_zeros(1, 4)]).to(rois.dtype)
    classes = torch.cat([*labels, labels[0].new_zeros(1)])
    image = torch.cat([*(rois.new_full((len(b),), i) for i, b in enumerate(boxes)), rois.new_full((1,), -1)])
    iou, best = torch.where(rois[:, :1] == image, _iou(rois[:, None, 1:], everything[None]), -1.0).max(1)
    return everything[best], classes[best], iou


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 4]``, of shapes that broadcast."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    both = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    return both / union.clamp(min=torch.finfo(union.dtype).tiny)
