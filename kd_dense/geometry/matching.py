"""Hungarian matching of the queries of two models.

The one place where a step waits for the device: the assignment is solved by SciPy on the host, as MMDetection's own
assigner does for each image and decoder layer of the student's loss. Here it is one copy to the host for all of them,
and one back, which nobody waits for.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kd_dense.losses.queries import corners, giou, probability


def pair_costs(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    scores: Tensor,
    activation: str,
    weights: tuple[float, float, float],
) -> Tensor:
    """``f_j (w_class CE(p_j, q_i) + w_l1 |b_i - b_j|_1 + w_giou (1 - GIoU(b_i, b_j)))`` of every pair.

    The cross-entropy is the KL of the loss up to a number for each teacher query, which no assignment of all of them
    can change; it is a matrix product, where the KL of all pairs would take ``K`` times the memory.

    Args:
        student: class logits ``[B, Q, K]`` and boxes ``[B, Q, 4]`` (``cx, cy, w, h`` in shares of the image).
        teacher: the same of ``n`` queries.
        scores: ``f`` ``[B, n]``, the foreground scores of the teacher's queries.
        activation: ``'sigmoid'`` or ``'softmax'`` of both sides.
        weights: of the class, L1 and GIoU terms.

    Returns:
        ``[B, n, Q]``
    """
    (s_logits, s_boxes), (t_logits, t_boxes) = student, teacher
    class_weight, l1_weight, giou_weight = weights
    cost = s_logits.new_zeros(scores.shape[0], scores.shape[1], s_logits.shape[1])
    if class_weight:
        # CE(p, q) = sum_c softplus(s) - p s, or logsumexp(s) - sum_c p s
        rest = F.softplus(s_logits).sum(-1) if activation == 'sigmoid' else s_logits.logsumexp(-1)
        products = probability(t_logits, activation) @ s_logits.transpose(1, 2)
        cost += class_weight * (rest[:, None] - products)
    if l1_weight:
        cost += l1_weight * torch.cdist(t_boxes, s_boxes, p=1)
    if giou_weight:
        cost += giou_weight * (1 - giou(corners(t_boxes)[:, :, None], corners(s_boxes)[:, None]))
    return cost * scores[..., None]


def assign(costs: Tensor) -> Tensor:
    """The cheapest assignment of every row to a column of its own.

    Args:
        costs: ``[..., n, Q]``, ``n <= Q``, finite.

    Returns:
        ``[..., n]`` indices of the columns, on the device of ``costs``.
    """
    host = costs.detach().flatten(0, -3).cpu().numpy()
    found = torch.from_numpy(np.stack([linear_sum_assignment(matrix)[1] for matrix in host]))
    found = found.view(costs.shape[:-1])
    # from pinned memory the copy runs while the host goes on
    return (found.pin_memory() if costs.is_cuda else found).to(costs.device, non_blocking=True)
