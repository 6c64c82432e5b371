"""Label maps that a teacher predicts, as labels for a student: which pixels, with what weight, and in another view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_dense.adaptation.pseudo_boxes import thresholds
from kd_dense.adaptation.warp import Matrices, project
from kd_dense.errors import ConfigError, closest
from kd_dense.losses.reduction import at_least_fp32

WEIGHTINGS = ('hard', 'confidence', 'share')


class PseudoMap(NamedTuple):
    """Pseudo labels of the pixels of a batch.

    Args:
        labels: ``[B, H, W]`` class indices, ``ignore_index`` where there is none.
        confidence: ``[B, H, W]`` the probability of the most likely class, 0..1, whether it became a label or not.
        weights: ``[B, H, W]`` how much each pixel counts in a loss; 0 where there is no label.
    """

    labels: Tensor
    confidence: Tensor
    weights: Tensor


@torch.no_grad()
def pseudo_label_map(
    logits: Tensor,
    threshold: float | Sequence[float] | Tensor = 0.9,
    ignore_index: int = 255,
    weighting: str = 'hard',
    mask: Tensor | None = None,
) -> PseudoMap:
    """The most likely class of every pixel where its softmax probability is above the threshold.

    Args:
        logits: ``[B, C, H, W]`` of the teacher, of the size of the labels.
        threshold: one for all classes, or one for each, of which a tensor on the device costs no copy. 0.9 is our
            choice; SSDA-YOLO has no form for segmentation.
        ignore_index: label of the other pixels.
        weighting: ``'hard'``: 1 where there is a label. ``'confidence'``: the probability there. ``'share'``: every
            pixel that counts is labelled, and weighs as much as the share of the pixels of its image that are above
            the threshold: the weight of DACS and DAFormer (Hoyer et al., CVPR 2022), whose code takes the share over
            the batch.
        mask: boolean ``[B, 1, H, W]``, pixels that count; all of them when ``None``.

    Raises:
        ConfigError: an option out of its range.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(f'pseudo_labels.weighting: unknown weighting {weighting!r}; {closest(weighting, WEIGHTINGS)}')
    logits = at_least_fp32(logits)
    top, labels = logits.max(1)
    confidence = (top - logits.logsumexp(1)).exp()  # of one class only: no probabilities of all of them are kept
    above = confidence > thresholds(threshold, labels, confidence)
    counts = torch.ones_like(above) if mask is None else mask.expand(-1, 1, *above.shape[1:])[:, 0]
    kept = above & counts
    if weighting == 'share':
        share = kept.to(confidence).sum((1, 2), keepdim=True) / counts.sum((1, 2), keepdim=True).clamp(min=1)
        kept, weights = counts, share * counts
    else:
        weights = kept * confidence if weighting == 'confidence' else kept.to(confidence)
    return PseudoMap(labels.where(kept, torch.full_like(labels, ignore_index)), confidence, weights)


def warp_label_map(maps: Tensor, matrices: Matrices, size: tuple[int, int], fill: float = 255) -> Tensor:
    """Label maps in another view: the label of the pixel that each pixel's centre comes from; nothing is interpolated.

    Args:
        maps: ``[B, H, W]`` of any type: labels, or confidences and weights.
        matrices: from pixels of the maps to pixels of the result, see :func:`between_views`.
        size: ``(h, w)`` of the result.
        fill: value of pixels that come from outside: the ignored label, or 0 for weights.

    Returns:
        ``[B, h, w]``
    """
    inverse = torch.linalg.inv(torch.as_tensor(matrices, dtype=torch.float64)).to(maps.device)
    height, width = maps.shape[1:]
    y, x = (torch.arange(n, device=maps.device, dtype=torch.float64) + 0.5 for n in size)
    centres = torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).view(-1, 2)
    points, visible = project(centres, inverse.expand(len(maps), 3, 3))  # [B, h w, 2]
    column, row = points.floor().unbind(-1)
    visible = visible & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = torch.where(visible, row * width + column, 0).long()
    return torch.where(visible, maps.flatten(1).gather(1, index), fill).to(maps.dtype).view(-1, *size)


def balanced_class_weights(counts: Tensor, limit: float = 10.0) -> Tensor:
    """Weight of each class such that all classes count the same: ``n / (K n_c)``.

    ``n_c`` labels of class ``c``, ``n`` of all, ``K`` classes that occur. With it, the weights of all labels sum to
    ``n``, as they do without, unless the limit applies.

    Args:
        counts: ``[C]``.
        limit: no class weighs more: a class of a few pixels, most of them wrong, must not lead.

    Returns:
        ``[C]``; 0 for classes that do not occur.
    """
    counts = counts.double()
    present = counts > 0
    weights = counts.sum() / (present.sum().clamp(min=1) * counts.clamp(min=1))
    return torch.where(present, weights.clamp(max=limit), 0)


def sampling_probabilities(counts: Tensor, temperature: float = 0.01) -> Tensor:
    """How often to draw an image for the sake of each class: ``softmax_c((1 - f_c) / T)``, ``f_c`` its share of pixels.

    Rare class sampling of DAFormer (Hoyer et al., CVPR 2022, section 3.3, ``T = 0.01``). Its code leaves classes that
    do not occur out, and so does this: there is no image to draw for them.

    Args:
        counts: ``[C]`` pixels of each class in the source domain.
        temperature: ``T`` > 0; the higher, the more even.

    Raises:
        ConfigError: a temperature that is not positive, or no class at all.
    """
    if not temperature > 0:
        raise ConfigError(f'sampling.temperature: must be > 0, not {temperature!r}')
    counts = counts.double()
    if not bool(counts.sum() > 0):
        raise ConfigError('sampling: no class occurs in the source domain; check its label maps')
    rarity = (1 - counts / counts.sum()) / temperature
    return rarity.masked_fill(counts == 0, -torch.inf).softmax(0)
