"""How class logits of a dense sigmoid head are kept: few anchors with several classes, and all others with one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kd_dense.cache.int8 import from_int8, to_int8

#: Least mean score: its logarithm is taken.
_FLOOR = 1e-12
#: Log-odds of a class where there is nothing, not even an image.
NOTHING = math.log(_FLOOR)
#: Least log-odds of those that are kept in 8 bits. Less, one in ten millions, would only take levels from the others.
_LEAST = -16.0
#: Of the kept anchors, one in so many is reserved for the levels, in equal shares.
_SPREAD = 4


def to_sparse(levels: Sequence[Tensor], num_classes: int, anchors: int, k: int) -> dict[str, Tensor]:
    """Of one image the ``anchors`` with the largest scores, with ``k`` classes each; of all others the best class.

    ``p = sigmoid(logits)`` of ``C`` classes. An anchor is chosen by ``max_c p_c``, among those of all levels; but of
    each of ``L`` levels at least ``anchors // (4 L)`` are chosen (all, where it has fewer). Of a chosen one the ``k``
    largest scores are kept, and of the others the mean ``r = (sum_c p_c - sum_k p_k) / (C - k)``. Of an anchor that is
    not chosen its largest score is kept, in 8 bits; and of its level, of each class, the mean score over those where it
    is not the largest.

    So the sum of the scores and that of the largest scores, by which :class:`~kd_dense.distillers.LogitKD` divides,
    stay what they are up to rounding. The form is ours. Means alone, of each class over all anchors of a level that
    were not chosen, would take two bytes an anchor less; but most of their scores are near 0 and some are not, so that
    a large part of the anchors has to be chosen before that makes no difference (``docs/cache.md`` has numbers).

    Scores are kept as log-odds, ``log(p / (1 - p))``: those of the kept classes are the head's own logits in fp16, as
    where all of them are kept, and scores near 0 have as many digits as others.

    Args:
        levels: ``[A * C, h, w]`` each, ``A`` anchors per cell.
        num_classes: ``C``.
        anchors: ``M``; all, where there are fewer.
        k: ``K`` <= ``C``.

    Returns:
        Anchors are counted level by level, in each by ``A``, ``h``, ``w``: ``N`` in all. Classes are uint8 (int16 above
        256).

        * ``i``: ``[M]`` rising numbers of the chosen anchors, int16 (int32 above 32 768 anchors);
        * ``v``: ``[K, M]`` their logits, fp16, falling, and ``c``: ``[K, M]`` the classes; with ``k = C``, all logits
          in the order of the classes, and neither ``c`` nor ``r``;
        * ``r``: ``[M]`` log-odds of the mean of their other scores, fp16;
        * ``q``: ``[N]`` log-odds of the largest score in 8 bits, ``s``: ``[2, 1]`` their smallest and their step, fp32,
          and ``m``: ``[N]`` its class;
        * ``b``: ``[L, C]`` log-odds of the mean scores of a level, fp32.
    """
    # [A * C, h, w] -> [C, A * h * w]
    parts = [x.float().unflatten(0, (-1, num_classes)).transpose(0, 1).flatten(1) for x in levels]
    counts = [part.shape[1] for part in parts]
    logits = torch.cat(parts, 1)
    best, best_class = logits.max(0)
    chosen = _chosen(best.split(counts), anchors)
    left = torch.ones_like(best, dtype=torch.bool).index_fill(0, chosen, False)
    most = best.masked_fill(~left, _LEAST).max()  # the chosen ones need no room in the 8 bits
    eighth, scale = to_int8(best.clamp(min=_LEAST).minimum(most)[:, None])
    others = left.expand_as(logits).scatter(0, best_class[None], False)
    means = [
        (part.sigmoid() * counted).sum(1) / counted.sum(1).clamp(min=1)
        for part, counted in zip(parts, others.split(counts, 1), strict=True)
    ]
    classes = torch.uint8 if num_classes <= 256 else torch.int16
    kept = logits[:, chosen]
    sparse = {
        'i': chosen.to(torch.int16 if len(best) <= 1 << 15 else torch.int32),
        'q': eighth[:, 0],
        's': scale[:, 0],
        'm': best_class.to(classes),
        'b': _log_odds(torch.stack(means)).float(),
    }
    if k == num_classes:
        return sparse | {'v': kept.half()}
    values, which = kept.topk(k, 0)
    rest = kept.sigmoid().scatter(0, which, 0.0).sum(0) / (num_classes - k)
    return sparse | {'v': values.half(), 'c': which.to(classes), 'r': _log_odds(rest).half()}


def from_sparse(sparse: Mapping[str, Tensor], sizes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Logits ``[B, A * C, h, w]`` of every level, fp32, of what :func:`to_sparse` kept of images of one canvas.

    Args:
        sparse: as it was returned, with a batch dimension in front.
        sizes: ``(A, h, w)`` of every level.
    """
    counts = [a * h * w for a, h, w in sizes]
    means = sparse['b'].transpose(1, 2)  # [B, C, L]
    full = torch.cat([means[:, :, i, None].expand(-1, -1, n) for i, n in enumerate(counts)], 2)
    best = from_int8(sparse['q'], sparse['s'].transpose(0, 1))
    full.scatter_(1, sparse['m'].long()[:, None], best[:, None])
    kept = sparse['v'].float()
    if 'c' in sparse:
        rest = sparse['r'].float()[:, None].expand(-1, full.shape[1], -1)
        kept = rest.scatter(1, sparse['c'].long(), kept)
    full.scatter_(2, sparse['i'].long()[:, None].expand_as(kept), kept)
    levels = zip(full.split(counts, 2), sizes, strict=True)
    # [B, C, A * h * w] -> [B, A * C, h, w]
    return [part.unflatten(2, size).transpose(1, 2).flatten(1, 2) for part, size in levels]


def _chosen(best: Sequence[Tensor], anchors: int) -> Tensor:
    """Numbers of the chosen anchors, rising.

    Args:
        best: of each level ``[A * h * w]``, the largest logit of each anchor.
    """
    least = anchors // (_SPREAD * len(best))
    starts = itertools.accumulate((len(level) for level in best), initial=0)
    certain = [level.topk(min(least, len(level))).indices + start for level, start in zip(best, starts, strict=False)]
    ranked = torch.cat(list(best)).index_fill(0, torch.cat(certain), math.inf)
    return ranked.topk(min(anchors, len(ranked))).indices.sort().values


def _log_odds(mean: Tensor) -> Tensor:
    return torch.logit(mean.double(), eps=_FLOOR)
