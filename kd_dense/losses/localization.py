"""Distances of the boxes that a student and a teacher predict at the same places. Gradients go to the student only.

One number for each place, not a scalar: a method weighs them by its regions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.queries import giou
from kd_dense.losses.reduction import prepare

#: Least area, in the square of whatever unit the boxes have; a distance to a box without any must not explode.
_EPS = 1e-6


def distribution_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 / 4 * sum over the sides of KL(p || q)``, each side a softmax over its bins at temperature ``T``.

    Source: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022. The authors' code
    takes the mean over the bins in place of the sum.

    Args:
        student, teacher: logits ``[..., 4, K, P]``: of the left, top, right and bottom side, ``K`` bins, ``P`` places.

    Returns:
        ``[..., P]`` in nats, >= 0.
    """
    student, teacher = prepare(student, teacher)
    log_q = F.log_softmax(student / temperature, dim=-2)
    log_p = F.log_softmax(teacher / temperature, dim=-2)
    kl = F.kl_div(log_q, log_p, reduction='none', log_target=True).sum(-2)
    return kl.mean(-2) * temperature**2


def giou_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - GIoU``, 0..2: 0 for equal boxes, 1 for boxes that touch, more the further they are apart.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 2. A box whose right edge is
    left of its left edge counts as one of no area.

    Args:
        student, teacher: ``x1, y1, x2, y2`` in dimension -2: ``[..., 4, P]``.

    Returns:
        ``[..., P]``.
    """
    return 1 - giou(*(_with_area(x).transpose(-2, -1) for x in prepare(student, teacher)), eps=_EPS)


def _with_area(boxes: Tensor) -> Tensor:
    low, high = boxes.split(2, dim=-2)
    return torch.cat([low, torch.maximum(low, high)], -2)


def box_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the four numbers of each box: ``[..., 4, P] -> [..., P]``."""
    student, teacher = prepare(student, teacher)
    return (student - teacher).abs().mean(-2)
