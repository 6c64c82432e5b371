"""What a distiller may know about the batch besides the tapped tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class TeacherRoIs(Protocol):
    """The RoI head of the teacher, at regions that the student chose."""

    def boxes(self, features: list[Tensor], rois: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Class logits ``[R, K + 1]`` and box deltas ``[R, 4 K]`` or ``[R, 4]`` of one stage.

        Args:
            features: the teacher's levels, as the tap ``roi_features`` gives them.
            rois: ``[R, 5]`` index of the image and ``x1, y1, x2, y2`` in pixels of the student's canvas.
        """

    def masks(self, features: list[Tensor], rois: Tensor, stage: int) -> Tensor:
        """Mask logits ``[P, K, h, w]`` or ``[P, 1, h, w]`` of one stage."""


@dataclass
class Context:
    """Ground truth, geometry and clock of one training batch, the same in all three toolboxes.

    All tensors live on the device of the model; building masks from them costs no device-to-host copy.

    Args:
        canvas: ``(H, W)`` of the padded batch in pixels.
        image_sizes: ``[B, 2]`` true height and width of each image on the canvas in pixels (images sit at the top
            left); ``None`` when nothing is padded.
        boxes: per image ``[n, 4]`` boxes ``x1, y1, x2, y2`` in canvas pixels, or ``None`` when the task has none.
        labels: per image ``[n]`` class indices, or ``None``.
        masks: per image ``[n, H, W]`` instance masks, or ``None``.
        label_map: ``[B, H, W]`` class index of every pixel, or ``None``.
        image: ``[B, C, H, W]`` the preprocessed batch that the student is given, or ``None`` when it is not handed on.
        ignore_index: label of pixels that take no part in any loss.
        iteration: iterations done since training began.
        epoch: epochs done since training began.
        progress: share of the training that is done, 0..1.
        teacher_rois: evaluates the teacher's RoI head, without gradients; ``None`` when it has none.
    """

    canvas: tuple[int, int]
    image_sizes: Tensor | None = None
    boxes: list[Tensor] | None = None
    labels: list[Tensor] | None = None
    masks: list[Tensor] | None = None
    label_map: Tensor | None = None
    image: Tensor | None = None
    ignore_index: int = 255
    iteration: int = 0
    epoch: int = 0
    progress: float = 0.0
    teacher_rois: TeacherRoIs | None = None
    _masks: dict = field(default_factory=dict, repr=False)

    def mask(self, size: tuple[int, int]) -> Tensor | None:
        """``[B, 1, h, w]`` boolean map of the cells that count, ``size`` being ``(h, w)``; ``None`` when all do.

        A cell counts when its centre lies inside the true image and, where a label map is given, when the pixel under
        its centre is not ``ignore_index``.
        """
        size = (int(size[0]), int(size[1]))
        if size not in self._masks:
            self._masks[size] = self._build_mask(size)
        return self._masks[size]

    def _build_mask(self, size: tuple[int, int]) -> Tensor | None:
        mask = None
        if self.image_sizes is not None:
            mask = inside(self.image_sizes, self.canvas, size)
        if self.label_map is not None:
            labels = self.label_map[:, None]
            if labels.shape[-2:] != size:
                # nearest-exact samples the pixel under the centre of each cell; it needs a floating type
                labels = F.interpolate(labels.float(), size=size, mode='nearest-exact')
            known = labels != self.ignore_index
            mask = known if mask is None else mask & known
        return mask


def inside(image_sizes: Tensor, canvas: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``[B, 1, h, w]`` boolean: is the centre of each cell of a ``size`` map over ``canvas`` inside its true image?

    Args:
        image_sizes: ``[B, 2]`` heights and widths in pixels.
    """
    (height, width), (h, w) = canvas, size
    y = (torch.arange(h, device=image_sizes.device) + 0.5) * (height / h)
    x = (torch.arange(w, device=image_sizes.device) + 0.5) * (width / w)
    rows = y[None] < image_sizes[:, :1]
    columns = x[None] < image_sizes[:, 1:]
    return rows[:, None, :, None] & columns[:, None, None, :]
