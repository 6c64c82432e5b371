"""The model that Ultralytics' trainer trains in mean-teacher adaptation: a student, and the moving average of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh

from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.pseudo_boxes import PseudoBoxes, artificial_box, select_boxes
from kd_dense.adaptation.statistics import BoxStatistics
from kd_dense.losses.adaptation import ssda_terms
from kd_dense.random_state import step_seed
from kd_dense.yolo.adaptation_config import Adaptation
from kd_dense.yolo.model import COUNTS
from kd_dense.yolo.paired_data import TARGET, TRANSLATED
from kd_dense.yolo.student_inside import StudentInsideModel


class AdaptationModel(StudentInsideModel):
    """A detector that adapts to a target domain without labels, taught by the moving average of itself.

    The loss is that of :func:`~kd_dense.losses.adaptation.ssda_terms` on the sums of Ultralytics' loss vectors, each of
    which is multiplied by the batch size. The student sees source images, their translations and target images in
    forwards of their own, as in the released code of SSDA-YOLO, so that each has the batch statistics of its own kind.
    The mean teacher sees the translations of the target images, in evaluation mode. Of a head with two branches
    (YOLO26) its predictions are those of the one-to-many branch, under non-maximum suppression.

    Args:
        student: the model to be trained, on its device, with ``nc`` classes.
        options: what the config says.
        known: the target happens to have labels, which precision is counted by.

    Raises:
        ConfigError: an option of the mean teacher out of its range, or thresholds for another number of classes.
    """

    def __init__(self, student: nn.Module, options: Adaptation, known: bool = False) -> None:
        super().__init__(student)
        self.options, self.known = options, known
        self._teacher = MeanTeacher(student, **options.mean_teacher)
        self.weights = options.weights()  # in no module: they are part of the config, not of a state
        self.statistics = BoxStatistics(student.nc)
        threshold = options.pseudo_labels.thresholds(student.nc, 'adaptation.pseudo_labels')
        device = next(student.parameters()).device
        self.register_buffer('threshold', threshold.to(device), persistent=False)

    @property
    def mean_teacher(self) -> MeanTeacher:
        """The moving average; ``None`` on Ultralytics' copy of this model."""
        return self._teacher

    def loss(self, batch: dict, preds: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of the adaptation.

        Args:
            batch: of the source as Ultralytics' data loaders make it, ``img`` ``[B, 3, H, W]`` in 0..1; with the
                entries ``translated`` (the same shape; may be left out) and ``target``, a batch likewise, whose labels
                are not trained on.
            preds: the student's predictions; used in evaluation mode, where only the loss of its task is computed.

        Returns:
            Loss parts to be summed, each multiplied by ``B`` as all losses of Ultralytics are, and the numbers for the
            log, not multiplied: those of the task on source images, and ``source``, ``styled``, ``pseudo`` and
            ``consistency`` as they are weighted.
        """
        if not self.training:
            return self.student_model.loss(batch, preds)
        weights = {name: weight(self.progress) for name, weight in self.weights.items()}
        source, items = self._task(batch, batch['img'])
        styled = pseudo = None
        if TRANSLATED in batch and (weights['styled'] or weights['consistency']):
            styled, _ = self._task(batch, batch[TRANSLATED])
        if weights['pseudo']:
            pseudo = self._under_pseudo_labels(batch[TARGET])
        terms = ssda_terms(source, styled, pseudo, weights['pseudo'], weights['consistency'], self.options.behaviour)
        if styled is not None:
            terms['styled_loss'] = weights['styled'] * terms['styled_loss']
        items, size = dict(items), batch['img'].shape[0]
        for name in ('source', 'styled', 'pseudo', 'consistency'):  # Ultralytics' log has the same columns always
            value = terms.get(f'{name}_loss', torch.zeros_like(terms['source_loss']))
            items[name] = value.detach() / size
        return torch.stack(list(terms.values())), items

    def _task(self, batch: dict, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss on ``images`` under the labels of ``batch``: its sum, and the numbers for the log."""
        parts, items = self.student_model.loss({**batch, 'img': images}, self.student_model(images))
        return parts.float().sum(), items

    def _under_pseudo_labels(self, target: dict) -> Tensor | None:
        """The student's loss on the images of the target, labelled by the teacher; ``None``: there are no labels."""
        images, options = target['img'], self.options.pseudo_labels
        found = self.pseudo_boxes(target.get(TRANSLATED, images))
        self._count(found, target)
        if not any(map(len, found)):
            if options.empty == 'skip':
                return None
            if options.empty == 'artificial_box':
                generator = torch.Generator().manual_seed(step_seed(0, self.iteration))
                found[0] = artificial_box(tuple(images.shape[2:]), generator, found[0].boxes)
        loss, _ = self._task(labels_of(found, tuple(images.shape[2:])), images)
        if options.weighting == 'score' and any(map(len, found)):
            loss = loss * torch.cat([one.weights for one in found]).mean()
        return loss

    def pseudo_boxes(self, images: Tensor) -> list[PseudoBoxes]:
        """What the mean teacher is sure of in each of ``images`` ``[B, 3, H, W]``, in pixels."""
        predictions = self.mean_teacher.run(lambda model: one_to_many(model, images)).float()
        boxes = xywh2xyxy(predictions[:, :4].transpose(1, 2))
        if self.options.behaviour == 'fixed':  # as Ultralytics clips the labels of its data sets
            height, width = images.shape[2:]
            boxes[..., 0::2].clamp_(0, width)
            boxes[..., 1::2].clamp_(0, height)
        return [self._select(*pair) for pair in zip(boxes, predictions[:, 4:], strict=True)]

    def _select(self, boxes: Tensor, scores: Tensor) -> PseudoBoxes:
        """Of one image: ``boxes`` ``[N, 4]``, ``scores`` ``[C, N]``. A cell may be sure of more than one class."""
        options = self.options.pseudo_labels
        labels, cells = (scores > self.threshold[:, None]).nonzero(as_tuple=True)
        return select_boxes(
            boxes[cells],
            scores[labels, cells],
            labels,
            self.threshold,
            options.iou_threshold,
            options.max_count,
            options.weighting,
        )

    def _count(self, found: list[PseudoBoxes], target: dict) -> None:
        truth: list = [None] * len(found)
        if self.known:
            height, width = target['img'].shape[2:]
            boxes = xywh2xyxy(target['bboxes']) * target['bboxes'].new_tensor([width, height, width, height])
            counts = target[COUNTS]
            truth = zip(boxes.split(counts), target['cls'].flatten().long().split(counts), strict=True)
        for one, objects in zip(found, truth, strict=True):
            self.statistics.update(one, candidates=0, truth=objects)


def one_to_many(model: nn.Module, images: Tensor) -> Tensor:
    """``[B, 4 + C, N]``: centre and size in pixels and class probabilities at every cell, before any suppression."""
    model.model[-1].end2end = False
    return model(images)[0]


def labels_of(found: list[PseudoBoxes], size: tuple[int, int]) -> dict[str, Tensor]:
    """Pseudo boxes as the entries of a batch of Ultralytics.

    Args:
        found: one for each image.
        size: ``(H, W)`` of the images.

    Returns:
        ``batch_idx`` ``[M]``, ``cls`` ``[M, 1]`` and ``bboxes`` ``[M, 4]``, centre and size as shares of the image.
    """
    boxes = torch.cat([one.boxes for one in found])
    numbers = torch.cat([torch.full_like(one.scores, i) for i, one in enumerate(found)])
    height, width = size
    return {
        'batch_idx': numbers,
        'cls': torch.cat([one.labels for one in found])[:, None].to(boxes),
        'bboxes': xyxy2xywh(boxes) / boxes.new_tensor([width, height, width, height]),
    }
