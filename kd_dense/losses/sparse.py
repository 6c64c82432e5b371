"""Cross-entropy to class probabilities of which only the largest are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_cross_entropy(student: Tensor, probabilities: Tensor, classes: Tensor) -> Tensor:
    """``mean_b sum_c -y_bc log q_bc``: ``q`` is the student's softmax, ``y`` the teacher's, known for ``K`` classes.

    The rest of the probability is spread evenly over the other classes, as in Wu et al., "TinyViT", ECCV 2022:
    ``y_c = v_k`` where ``c = I_k``, else ``m = (1 - sum_k v_k) / (C - K)``. ``y`` is never formed: with
    ``l = log_softmax(z)``, a row of the loss is ``-(sum_k (v_k - m) l[I_k] + m sum_c l_c)``, and its gradient
    ``softmax(z) - y``. Where fp16 rounded the sum of ``v`` above 1, ``m`` is 0, and ``y`` is divided by its sum (the
    authors' code does neither).

    Args:
        student: logits ``z``, ``[B, C]``.
        probabilities: ``v``, ``[B, K]``, of any floating-point type; ``K <= C``.
        classes: ``I``, ``[B, K]``, of any integer type, all different in a row.

    Returns:
        Scalar in nats, fp32; at least :func:`sparse_entropy`.
    """
    logs = F.log_softmax(student.float(), 1)
    kept, tail, total = _parts(probabilities, student.shape[1])
    rows = ((kept - tail) * logs.gather(1, classes.long())).sum(1) + tail[:, 0] * logs.sum(1)
    return -(rows / total[:, 0]).mean()


def sparse_entropy(probabilities: Tensor, num_classes: int) -> Tensor:
    """``mean_b sum_c -y_bc log y_bc`` of the ``y`` of :func:`sparse_cross_entropy`: what that is at its least.

    The difference of the two is the mean KL divergence.

    Args:
        probabilities: ``[B, K]``.
        num_classes: ``C``.
    """
    kept, tail, total = _parts(probabilities, num_classes)
    missing = num_classes - probabilities.shape[1]
    return -(
        torch.xlogy(kept / total, kept / total).sum(1) + missing * torch.xlogy(tail / total, tail / total)[:, 0]
    ).mean()


def _parts(probabilities: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """``v``, ``m`` and the sum of ``y``: ``[B, K]``, ``[B, 1]``, ``[B, 1]``, fp32."""
    kept = probabilities.float()
    missing = num_classes - kept.shape[1]
    tail = ((1 - kept.sum(1, keepdim=True)) / max(missing, 1)).clamp(min=0)
    if missing == 0:  # nothing to spread over
        tail = torch.zeros_like(tail)
    return kept, tail, kept.sum(1, keepdim=True) + missing * tail
