"""What became of the pseudo labels: how many were kept, of which classes, and how many are right where that is known.

Counted on the device; only a report asks it for numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kd_dense.adaptation.pseudo_boxes import PseudoBoxes


class BoxStatistics:
    """Counts pseudo boxes of a detector.

    Args:
        num_classes: ``C``.
        iou_threshold: overlap from which on a box is right about an object of its class.
    """

    def __init__(self, num_classes: int, iou_threshold: float = 0.5) -> None:
        self.num_classes, self.iou_threshold = num_classes, iou_threshold
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._images = self._candidates = 0
        self._counts = self._correct = self._judged = self._score = None

    @torch.no_grad()
    def update(self, pseudo: PseudoBoxes, candidates: int, truth: tuple[Tensor, Tensor] | None = None) -> None:
        """Count one image.

        Args:
            candidates: predictions that ``pseudo`` was chosen from.
            truth: boxes ``[m, 4]`` and labels ``[m]`` of the objects in it; ``None``: not known.
        """
        if self._counts is None:
            zeros = torch.zeros(self.num_classes, dtype=torch.long, device=pseudo.boxes.device)
            self._counts, self._correct, self._judged = zeros, zeros.clone(), zeros.clone()
            self._score = zeros.new_zeros((), dtype=torch.float64)
        self._images += 1
        self._candidates += candidates
        one = torch.ones_like(pseudo.labels)
        self._counts.scatter_add_(0, pseudo.labels, one)
        self._score += pseudo.scores.sum()
        if truth is not None:
            right = correct_boxes(pseudo, *truth, self.iou_threshold)
            self._judged.scatter_add_(0, pseudo.labels, one)
            self._correct.scatter_add_(0, pseudo.labels, right.long())

    def report(self, classes: Sequence[str] | None = None) -> dict[str, float]:
        """Numbers for the log; those that nothing is known about are left out.

        ``kept``: share of the predictions; ``per_image``; ``score``: mean; ``precision``; and ``count.NAME`` of every
        class, with ``precision.NAME`` where it occurs. A ``per_image`` that goes towards 0 is a teacher that collapses.

        Args:
            classes: their names; ``None``: their indices.
        """
        if self._counts is None:
            return {}
        counts, correct, judged = (x.tolist() for x in (self._counts, self._correct, self._judged))
        total = sum(counts)
        found = {'per_image': total / self._images}
        if self._candidates:
            found['kept'] = total / self._candidates
        if total:
            found['score'] = float(self._score) / total
        return found | _per_class(counts, correct, judged, classes)


class MapStatistics:
    """Counts pseudo labels of pixels.

    Args:
        num_classes: ``C``.
        ignore_index: label of pixels without one, in pseudo labels and truth.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._pixels = 0
        self._counts = self._correct = self._judged = None

    @torch.no_grad()
    def update(self, labels: Tensor, truth: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            labels: ``[B, H, W]`` pseudo labels.
            truth: ``[B, H, W]``; ``None``: not known.
        """
        if self._counts is None:
            zeros = torch.zeros(self.num_classes, dtype=torch.long, device=labels.device)
            self._counts, self._correct, self._judged = zeros, zeros.clone(), zeros.clone()
        self._pixels += labels.numel()
        kept = labels != self.ignore_index
        index = labels.where(kept, 0).flatten().long()
        self._counts.scatter_add_(0, index, kept.flatten().long())
        if truth is not None:
            known = kept & (truth != self.ignore_index)
            self._judged.scatter_add_(0, index, known.flatten().long())
            self._correct.scatter_add_(0, index, (known & (labels == truth)).flatten().long())

    @property
    def counts(self) -> Tensor | None:
        """``[C]`` labels of each class so far, on the device; for :func:`balanced_class_weights`."""
        return self._counts

    def report(self, classes: Sequence[str] | None = None) -> dict[str, float]:
        """Numbers for the log, as in :meth:`BoxStatistics.report`; ``kept`` is the share of the pixels."""
        if self._counts is None:
            return {}
        counts, correct, judged = (x.tolist() for x in (self._counts, self._correct, self._judged))
        return {'kept': sum(counts) / self._pixels} | _per_class(counts, correct, judged, classes)


def _per_class(counts: list, correct: list, judged: list, classes: Sequence[str] | None) -> dict[str, float]:
    names = [str(i) for i in range(len(counts))] if classes is None else classes
    found = {'precision': sum(correct) / sum(judged)} if sum(judged) else {}
    for name, n, right, known in zip(names, counts, correct, judged, strict=True):
        found[f'count.{name}'] = n
        if known:
            found[f'precision.{name}'] = right / known
    return found


def correct_boxes(pseudo: PseudoBoxes, boxes: Tensor, labels: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """Which pseudo boxes are right, by the rule of PASCAL VOC.

    A box belongs to the object of its class that it overlaps most. It is right when they overlap by ``iou_threshold``
    and no better box is right about that object.

    Args:
        pseudo: best first.
        boxes: ``[m, 4]`` of the objects.
        labels: ``[m]`` of the objects.

    Returns:
        Boolean ``[n]``.
    """
    n, m = len(pseudo), len(boxes)
    if not n or not m:
        return torch.zeros(n, dtype=torch.bool, device=pseudo.boxes.device)
    iou = box_iou(pseudo.boxes, boxes.to(pseudo.boxes))
    iou = iou.where(pseudo.labels[:, None] == labels[None], -1)
    overlap, object_ = iou.max(1)
    rank = torch.arange(n, device=iou.device)
    near = overlap >= iou_threshold
    first = torch.full((m,), n, device=iou.device).scatter_reduce(0, object_, rank.where(near, n), 'amin')
    return near & (first[object_] == rank)
