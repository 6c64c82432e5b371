"""The joined model that Ultralytics' trainer trains: a student, a frozen teacher and distillers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import xywh2xyxy

from kd_dense.cache.teacher import FIELD, CachedTeacher
from kd_dense.context import Context
from kd_dense.distillation import Distillers
from kd_dense.distillers.base import Distiller
from kd_dense.errors import ConfigError
from kd_dense.execution import Execution
from kd_dense.teacher import Remap, Teacher
from kd_dense.yolo.describe import describe
from kd_dense.yolo.student_inside import StudentInsideModel
from kd_dense.yolo.teacher import adapter

#: Batch entry with the number of objects in each image, which the trainer counts before the batch goes to the device.
COUNTS = 'objects_per_image'


class DistillationModel(StudentInsideModel):
    """Ultralytics' own distillation model with any distillers of kd_dense in place of its built-in loss.

    Args:
        student: the model to be trained, on its device.
        teacher: a loaded teacher on the same device, see :func:`kd_dense.yolo.teacher.load_teacher`; or a cache of its
            outputs, which batches then bring along.
        distillers: what to distil. Set up here.
        execution: how the teacher is run; ``None``: as it is.

    Raises:
        ConfigError: taps that a model does not have, or shapes that a distiller can not bring together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | CachedTeacher,
        distillers: Distillers,
        execution: Execution | None = None,
    ) -> None:
        super().__init__(student)
        self.distillers = distillers
        cached = isinstance(teacher, CachedTeacher)
        ours, theirs = describe(student), teacher.description() if cached else adapter(teacher).describe(teacher)
        distillers.setup(ours, theirs)
        if not cached:
            remap = Remap(ours.normalization, theirs.normalization)
            tapped = distillers.taps('teacher', distillers.methods).paths
            teacher = Teacher(teacher, None if remap.is_identity else remap, execution, tapped, LOGGER.info)
        self._teacher: Teacher | CachedTeacher | None = teacher
        distillers.to(next(student.parameters()).device)

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher; ``None`` on the copy that holds the moving average, and where there is a cache instead."""
        return self._teacher and self._teacher.model

    @teacher_model.setter
    def teacher_model(self, value: None) -> None:
        # Ultralytics takes the teacher off the moving average's copy; nobody reads averaged connectors either.
        self._teacher = self.distillers = None

    @property
    def remap(self) -> Remap | None:
        """From the student's images to the teacher's; ``None`` where it sees the same."""
        return self._teacher and self._teacher.remap

    def loss(self, batch: dict, preds: object = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The task loss, followed by the weighted distillation loss.

        Args:
            batch: as Ultralytics' data loaders make it: ``img`` ``[B, C, H, W]`` in 0..1, ``bboxes``, ``cls`` and
                ``batch_idx``.
            preds: the student's predictions; used in evaluation mode, where only the task loss is computed.

        Returns:
            Loss parts to be summed, each multiplied by ``B`` as all losses of Ultralytics are, and the numbers for the
            log, not multiplied, with one entry per distiller.
        """
        if not self.training:
            return self.student_model.loss(batch, preds)
        images = batch['img']
        context = self._context(batch)
        active = self.distillers.active(self.progress)
        if active:
            # The teacher goes first: what it needs on the way is free again before the student stores for its backward.
            teacher = self._teacher_values(batch, active)
            context.image = images = self.distillers.view(images, context)
            with self.distillers.taps('student', active).record() as taps:
                if self.distillers.calibrates(active):
                    preds = self.student_model.forward(images)  # not by way of what was compiled
                else:
                    preds = self.student_model(images)
                student = taps.take()
            parts, items = self.student_model.loss(batch, preds)
            del preds
            size = images.shape[0]
            losses = self.distillers(student, teacher, context, lambda: parts.sum() / size)
        else:
            parts, items = self.student_model.loss(batch, self.student_model(images))
            losses = {}
        sums = self._sum_by_distiller(losses, images)
        parts = torch.cat([parts.reshape(-1), sum(sums.values()).reshape(1) * images.shape[0]])
        return parts, self._with_items(items, sums)

    def _teacher_values(self, batch: dict, active: Mapping[str, Distiller]) -> dict[str, list[Tensor]]:
        if isinstance(self._teacher, CachedTeacher):
            if FIELD not in batch:
                raise ConfigError(
                    'teacher.cache: the batch brings none of its outputs along; train with tools/train.py, or with a '
                    'trainer of kd_dense.yolo'
                )
            return self._teacher.outputs(batch[FIELD], self.distillers.tap_names('teacher', active))
        return self.teacher_outputs(batch['img'], active)

    def teacher_outputs(self, images: Tensor, active: Mapping[str, Distiller]) -> dict[str, list[Tensor]]:
        """Tap name -> tensors of the live teacher for images ``[B, C, H, W]`` in 0..1.

        Args:
            active: the distillers whose taps are wanted.
        """
        taps = self.distillers.taps('teacher', active)
        return self._teacher(taps, images, adapter(self.teacher_model).forward_for(self.teacher_model, taps))

    def _sum_by_distiller(self, losses: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """One scalar per distiller, 0 for those that sleep: Ultralytics' log must have the same columns always."""
        sums = {}
        for name in self.distillers.methods:
            own = [v for k, v in losses.items() if k.startswith(f'{name}.') and 'loss' in k[len(name) :]]
            sums[name] = sum(own) if own else images.new_zeros((), dtype=torch.float32)
        return sums

    def _with_items(self, items: dict[str, Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        items = dict(items)
        for name, value in sums.items():
            if name in items:
                raise ConfigError(f'distillers.{name}: the log already has a column of this name; choose another one')
            items[name] = value.detach()
        return items

    def _context(self, batch: dict) -> Context:
        images = batch['img']
        height, width = images.shape[2:]
        boxes = labels = None
        if 'bboxes' in batch:
            counts = batch.get(COUNTS)
            if counts is None:
                counts = count_objects(batch)
            scale = batch['bboxes'].new_tensor([width, height, width, height])
            # The data loader lists the objects image by image.
            boxes = list(xywh2xyxy(batch['bboxes']).mul(scale).split(counts))
            labels = list(batch['cls'].flatten().long().split(counts))
        return Context(
            canvas=(height, width),
            boxes=boxes,
            labels=labels,
            image=images,
            iteration=self.iteration,
            epoch=self.epoch,
            progress=self.progress,
        )


def count_objects(batch: dict) -> list[int]:
    """Objects in each image of a batch."""
    return torch.bincount(batch['batch_idx'].long().flatten(), minlength=batch['img'].shape[0]).tolist()
