"""Boxes that a teacher predicts, as labels for a student: which of them, how much they count, where in another view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from kd_dense.adaptation.warp import Matrices, project
from kd_dense.errors import ConfigError, closest

WEIGHTINGS = ('hard', 'score')


@dataclass(frozen=True)
class PseudoBoxes:
    """Pseudo labels of one image, best first; none of them is a correct answer.

    Args:
        boxes: ``[n, 4]`` ``x1, y1, x2, y2`` in pixels.
        scores: ``[n]`` 0..1.
        labels: ``[n]`` class indices.
        weights: ``[n]`` how much each counts in a loss.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> PseudoBoxes:
        return PseudoBoxes(self.boxes[index], self.scores[index], self.labels[index], self.weights[index])


@torch.no_grad()
def select_boxes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    score_threshold: float | Sequence[float] | Tensor = 0.5,
    iou_threshold: float = 0.3,
    max_count: int = 20,
    weighting: str = 'hard',
) -> PseudoBoxes:
    """The predictions of one image that become pseudo labels.

    Score above the threshold, then non-maximum suppression within each class, then the ``max_count`` best. The defaults
    are those of SSDA-YOLO's released code, where a score is objectness times class probability and objectness alone
    has to pass the threshold as well; heads of today have no objectness.

    How many there are has to reach the host, as in the suppression itself: one of the few places that wait for the
    device.

    Args:
        boxes: ``[N, 4]`` ``x1, y1, x2, y2`` in pixels.
        scores: ``[N]`` 0..1.
        labels: ``[N]`` class indices.
        score_threshold: one for all classes, or one for each, of which a tensor on the device costs no copy.
        iou_threshold: of two boxes of a class that overlap more, the better one stays.
        max_count: at most so many.
        weighting: ``'hard'``: 1 each, as in SSDA-YOLO. ``'score'``: the score, so that doubtful ones count less.

    Raises:
        ConfigError: an option out of its range.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(f'pseudo_labels.weighting: unknown weighting {weighting!r}; {closest(weighting, WEIGHTINGS)}')
    if not 0 <= iou_threshold <= 1:
        raise ConfigError(f'pseudo_labels.iou_threshold: must lie between 0 and 1, not {iou_threshold!r}')
    if max_count < 1:
        raise ConfigError(f'pseudo_labels.max_count: must be at least 1, not {max_count!r}')
    passed = scores > thresholds(score_threshold, labels, scores)
    boxes, scores, labels = boxes[passed], scores[passed], labels[passed]
    # float64, because boxes of different classes are kept apart by shifting them far away from each other
    best = batched_nms(boxes.double(), scores.double(), labels, iou_threshold)[:max_count]
    boxes, scores, labels = boxes[best], scores[best], labels[best]
    return PseudoBoxes(boxes, scores, labels, scores.clone() if weighting == 'score' else torch.ones_like(scores))


def thresholds(value: float | Sequence[float] | Tensor, labels: Tensor, like: Tensor) -> float | Tensor:
    """The threshold that applies to each of ``labels``.

    Raises:
        ConfigError: not between 0 and 1.
    """
    if isinstance(value, Tensor):
        return value.to(like)[labels]
    values = [value] if isinstance(value, (int, float)) else list(value)
    if not values or not all(0 <= v <= 1 for v in values):
        raise ConfigError(f'pseudo_labels.score_threshold: must lie between 0 and 1, for each class, not {value!r}')
    return values[0] if isinstance(value, (int, float)) else torch.tensor(values, device=like.device).to(like)[labels]


def artificial_box(size: tuple[int, int], generator: torch.Generator, like: Tensor) -> PseudoBoxes:
    """The box that SSDA-YOLO's released code makes up for the first image of a batch in which nothing passed.

    Class 0, centred, both sides uniform in 0.2..0.8 of the image. It is there for runs that are to reproduce that code
    (``behaviour='official'`` of :func:`~kd_dense.losses.adaptation.ssda_terms`) and is used nowhere else: ``'fixed'``
    gives such a batch no pseudo-label term.

    Args:
        size: ``(H, W)`` of the image.
        generator: on the host.
        like: a tensor of the wanted device and type.
    """
    height, width = size
    half = (0.1 + 0.3 * torch.rand(2, generator=generator)) * torch.tensor([width, height])
    centre = torch.tensor([width, height]) / 2
    box = torch.cat([centre - half, centre + half])[None].to(like)
    one = box.new_ones(1)
    return PseudoBoxes(box, one, torch.zeros(1, dtype=torch.long, device=like.device), one)


def warp_boxes(boxes: Tensor, matrix: Matrices, size: tuple[int, int] | None = None) -> Tensor:
    """The upright boxes around ``boxes`` after ``matrix``.

    Exact under resizing, shifting and flipping; a rotation makes them larger, as upright boxes do.

    Args:
        boxes: ``[n, 4]`` ``x1, y1, x2, y2``.
        matrix: ``[3, 3]`` from pixels of the boxes to pixels of the result, see :func:`between_views`.
        size: ``(H, W)`` to clip to; ``None``: not clipped.
    """
    matrix = torch.as_tensor(matrix, dtype=boxes.dtype, device=boxes.device)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)
    corners, _ = project(corners, matrix)
    low, high = corners.amin(1), corners.amax(1)
    if size is not None:
        low, high = (torch.stack([x[:, 0].clamp(0, size[1]), x[:, 1].clamp(0, size[0])], 1) for x in (low, high))
    return torch.cat([low, high], 1)


def warp_pseudo_boxes(pseudo: PseudoBoxes, matrix: Matrices, size: tuple[int, int], min_side: float = 1) -> PseudoBoxes:
    """``pseudo`` in another view; without the boxes of which less than ``min_side`` pixels in a direction are left."""
    boxes = warp_boxes(pseudo.boxes, matrix, size)
    visible = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(1)
    return replace(pseudo, boxes=boxes)[visible]
