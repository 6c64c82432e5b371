"""Kullback-Leibler divergences between a teacher's and a student's predictions.

Every gradient goes to the student only; the teacher's tensors are constants. ``p`` is the teacher, ``q`` the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.losses.at_once import at_once
from kd_dense.losses.reduction import masked_mean, prepare, zero_outside


@at_once
def class_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """``T^2 * mean over positions of sum_c p_c (log p_c - log q_c)``, softmax over the classes at temperature ``T``.

    The factor ``T^2`` keeps the size of the gradient independent of ``T`` (Hinton et al. 2015, section 2).

    Args:
        student, teacher: logits ``[B, C, ...]``, classes in dimension 1, same shape.
        mask: boolean ``[B, 1, ...]``, positions that count; all of them when ``None``.

    Returns:
        Scalar in nats, >= 0; 0 when the mask is empty.
    """
    student, teacher = (zero_outside(x, mask) for x in prepare(student, teacher))
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    per_position = F.kl_div(log_q, log_p, reduction='none', log_target=True).sum(1, keepdim=True)
    return masked_mean(per_position, mask) * temperature**2


@at_once
def bernoulli_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL between independent sigmoid classes, summed over positions and classes, per expected teacher detection.

    ``T^2 * sum_{b,c,x} KL(Bernoulli(p) || Bernoulli(q)) / max(1, sum_{b,x} max_c p)``, in the divisor at ``T = 1``.
    Nearly all positions of a dense detector are background; a mean over positions would drown the rest. The
    divisor is the soft counterpart of the number of positives by which dense heads normalise their own classification
    loss. This normalisation is our choice: there is no single published form of logit distillation for sigmoid heads.

    Args:
        student, teacher: logits ``[B, C, ...]``, classes in dimension 1, same shape.
        mask: boolean ``[B, 1, ...]``, positions that count; all of them when ``None``.

    Returns:
        Scalar in nats, >= 0.
    """
    student, teacher = (zero_outside(x, mask) for x in prepare(student, teacher))
    s, t = student / temperature, teacher / temperature
    p = t.sigmoid()
    # KL = CE(p, q) - H(p); written with softplus so that no probability is ever 0 inside a logarithm:
    # p (log p - log q) + (1-p)(log(1-p) - log(1-q)) = p (t - s) - softplus(t) + softplus(s)
    kl = p * (t - s) - F.softplus(t) + F.softplus(s)
    foreground = teacher.sigmoid().amax(1, keepdim=True)
    if mask is not None:
        kl, foreground = zero_outside(kl, mask), zero_outside(foreground, mask)
    return kl.sum() / foreground.sum().clamp(min=1) * temperature**2


@at_once
def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Channel-wise divergence: ``T^2 / (B C) * sum_{b,c} KL(p_{b,c} || q_{b,c})``, softmax over its positions.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 3 and 4.

    Args:
        student, teacher: ``[B, C, h, w]``, same shape.
        mask: boolean ``[B, 1, h, w]``; positions outside it get probability 0 on both sides.

    Returns:
        Scalar in nats, >= 0. An image whose mask is empty adds 0.
    """
    s, t = (x.flatten(2) / temperature for x in prepare(student, teacher))
    if mask is not None:
        outside = ~mask.flatten(2)
        # The lowest finite number, not -inf: an image without any valid position must give 0, not NaN.
        lowest = torch.finfo(s.dtype).min
        s, t = s.masked_fill(outside, lowest), t.masked_fill(outside, lowest)
    log_q, log_p = F.log_softmax(s, dim=2), F.log_softmax(t, dim=2)
    return F.kl_div(log_q, log_p, reduction='sum', log_target=True) / (s.shape[0] * s.shape[1]) * temperature**2
