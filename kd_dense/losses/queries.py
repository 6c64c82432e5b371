"""Losses between the predictions of matched queries: two sets of which each member has class logits and a box.

Letters: ``L`` pairs of decoder layers, ``B`` images, ``n`` matched pairs of each image, ``K`` class channels: ``C`` for
sigmoid heads, ``C + 1`` with the background last for softmax heads. Boxes are ``cx, cy, w, h`` in shares of the image.

All of them are sums over images and pairs, divided by the number of objects that the teacher expects (the sum of its
foreground scores, at least 1), and a mean over the layers. Gradients go to the student only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.reduction import at_least_fp32, prepare


def foreground(logits: Tensor, activation: str) -> Tensor:
    """How sure each query is of an object: the largest class score (sigmoid), or ``1 - p(background)`` (softmax).

    Args:
        logits: ``[..., K]``.
        activation: ``'sigmoid'`` or ``'softmax'``.

    Returns:
        ``[...]`` in 0..1, fp32 or better.
    """
    probabilities = probability(at_least_fp32(logits), activation)
    return probabilities.amax(-1) if activation == 'sigmoid' else probabilities[..., :-1].sum(-1)


def probability(logits: Tensor, activation: str) -> Tensor:
    """Class probabilities ``[..., K]`` of logits ``[..., K]``."""
    return logits.sigmoid() if activation == 'sigmoid' else logits.softmax(-1)


def query_class_kl(
    student: Tensor,
    teacher: Tensor,
    scores: Tensor,
    activation: str,
    temperature: float = 1.0,
    negative_weight: float = 1.0,
) -> Tensor:
    """``T^2 * sum_{b,i} w_i KL(p_i || q_i) / max(1, sum_{b,i} f_i)``, ``w_i = f_i + negative_weight (1 - f_i)``.

    Args:
        student, teacher: logits ``[L, B, n, K]`` of the pairs.
        scores: ``f`` ``[L, B, n]``, the teacher's :func:`foreground` scores; constants.
        activation: ``'sigmoid'``: the KL of independent classes, summed over them; ``'softmax'``: of the distribution
            over classes and background.
        temperature: ``T`` > 0 of both sides.
        negative_weight: 0: a pair counts as much as the teacher sees an object there; 1: all pairs count the same.

    Returns:
        Scalar in nats, >= 0.
    """
    student, teacher = prepare(student, teacher)
    scores = at_least_fp32(scores.detach())
    s, t = student / temperature, teacher / temperature
    if activation == 'sigmoid':
        # p (log p - log q) + (1 - p)(log(1 - p) - log(1 - q)) without a probability of 0 inside a logarithm
        kl = t.sigmoid() * (t - s) - F.softplus(t) + F.softplus(s)
    else:
        kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction='none', log_target=True)
    return _per_object(kl.sum(-1) * torch.lerp(scores, torch.ones_like(scores), negative_weight), scores) * (
        temperature**2
    )


def query_l1(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    """``sum_{b,i} f_i |b_S - b_T|_1 / max(1, sum_{b,i} f_i)``, the norm over the four numbers of a box.

    Args:
        student, teacher: boxes ``[L, B, n, 4]``.
        scores: ``f`` ``[L, B, n]``; constants.
    """
    student, teacher = prepare(student, teacher)
    scores = at_least_fp32(scores.detach())
    return _per_object((student - teacher).abs().sum(-1) * scores, scores)


def query_giou(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    """``sum_{b,i} f_i (1 - GIoU(b_S, b_T)) / max(1, sum_{b,i} f_i)``; arguments as for :func:`query_l1`."""
    student, teacher = prepare(student, teacher)
    scores = at_least_fp32(scores.detach())
    return _per_object((1 - giou(corners(student), corners(teacher))) * scores, scores)


def _per_object(values: Tensor, scores: Tensor) -> Tensor:
    """``[L, B, n]`` both: sum of values per expected object in each layer, mean over the layers."""
    return (values.sum((1, 2)) / scores.sum((1, 2)).clamp(min=1)).mean()


def corners(boxes: Tensor) -> Tensor:
    """``[..., 4]``: ``cx, cy, w, h`` -> ``x1, y1, x2, y2``."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def giou(a: Tensor, b: Tensor, eps: float = 1e-12) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019): ``intersection / union + union / hull - 1``, in -1..1.

    ``hull`` is the smallest box around both. Stretching an axis changes nothing: shares of an image will do for pixels.

    Args:
        a, b: ``[..., 4]`` boxes ``x1, y1, x2, y2``, of shapes that broadcast.
        eps: least area, for boxes that are points.

    Returns:
        ``[...]``
    """
    # One number at a time: [..., 2] intermediates of all pairs would take twice the memory.
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection).clamp(min=eps)
    width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    return intersection / union + union / (width * height).clamp(min=eps) - 1
