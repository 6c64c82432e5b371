"""Sets of predictions of detection transformers, and what is said of them by loops, in float64."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from scipy.special import expit, log_expit, log_softmax, rel_entr, softmax

#: Class channels of a model of four classes.
ACTIVATIONS = {'sigmoid': 4, 'softmax': 5}
WEIGHTS = 1.0, 5.0, 2.0


def boxes(*shape, dtype=torch.float64):
    """Boxes ``cx, cy, w, h`` that lie inside the image, and overlap now and then."""
    size = 0.1 + 0.5 * torch.rand(*shape, 2, dtype=dtype)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, dtype=dtype), size], -1)


def kl(s, t, activation):
    """Of one query."""
    if activation == 'softmax':
        return rel_entr(softmax(t), softmax(s)).sum()
    p, q = expit(t), expit(s)
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()


def overlap(a, b):
    """GIoU of two boxes ``cx, cy, w, h``, from their definition, by areas of intervals."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b

    def both(u, m, v, n):  # length of the intersection, and of the hull, of two intervals given by centre and length
        low, high = sorted([(u - m / 2, u + m / 2), (v - n / 2, v + n / 2)])
        return max(0.0, min(low[1], high[1]) - high[0]), max(low[1], high[1]) - low[0]

    (iw, hw), (ih, hh) = both(ax, aw, bx, bw), both(ay, ah, by, bh)
    union = aw * ah + bw * bh - iw * ih
    return iw * ih / union - (hw * hh - union) / (hw * hh)


def cost(s, sb, t, tb, activation, weights):
    """Of one query of the student and one of the teacher."""
    if activation == 'softmax':
        entropy = -(softmax(t) * log_softmax(s)).sum()
    else:
        entropy = -(expit(t) * log_expit(s) + expit(-t) * log_expit(-s)).sum()
    return weights[0] * entropy + weights[1] * abs(sb - tb).sum() + weights[2] * (1 - overlap(sb, tb))


def all_costs(student, teacher, scores, activation='sigmoid', weights=WEIGHTS):
    (s, sb), (t, tb) = ([x.numpy() for x in side] for side in (student, teacher))
    return np.array(
        [
            [
                [
                    scores[b, j] * cost(s[b, i], sb[b, i], t[b, j], tb[b, j], activation, weights)
                    for i in range(s.shape[1])
                ]
                for j in range(t.shape[1])
            ]
            for b in range(len(s))
        ]
    )


def cheapest(costs):
    """The best of all ways to give each row a column of its own: ``[n, Q] -> [n]``."""
    rows = range(costs.shape[0])
    return min(permutations(range(costs.shape[1]), len(rows)), key=lambda way: sum(costs[j, way[j]] for j in rows))
