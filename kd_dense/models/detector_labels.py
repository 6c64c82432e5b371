"""What mean-teacher adaptation asks of a detector: pseudo boxes of target images, and the loss under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from kd_dense.adaptation.box_options import BoxOptions
from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.pseudo_boxes import PseudoBoxes, artificial_box, select_boxes, warp_pseudo_boxes
from kd_dense.adaptation.statistics import BoxStatistics
from kd_dense.adaptation.warp import between_views
from kd_dense.errors import ConfigError
from kd_dense.models.views import difference

#: Boxes that a head may leave after suppression: more than there are, because select_boxes counts them.
_ALL = 10_000
#: Pixels that a box has to have in both directions; a head may divide by its sides.
_MIN_SIDE = 1


class DetectorLabels(nn.Module):
    """The boxes that the mean teacher is sure of, as labels of target images.

    The teacher predicts on the view ``teacher`` as its detector does, with the thresholds of the pseudo labels in the
    place of its head's own while it does so; what is evaluated keeps its test config. Where the geometry of the views
    ``teacher`` and ``target`` differs, the boxes are taken over by the ``homography_matrix`` that MMDetection's
    transforms keep of each.

    Args:
        student: a detector with a ``bbox_head`` or ``roi_head``, without masks.
        options: of :class:`~kd_dense.adaptation.box_options.BoxOptions`.
        behaviour: ``'official'`` makes ``empty='artificial_box'`` the default.

    Attributes:
        statistics: what became of the boxes.

    Raises:
        ConfigError: another student, or an option that is unknown or out of its range.
    """

    #: Of the loss under pseudo labels, as in SSDA-YOLO.
    pseudo_weight = 0.005

    def __init__(self, student: nn.Module, options: Mapping | None, behaviour: str) -> None:
        super().__init__()
        _check_student(student)
        self.options = BoxOptions.parse(options, behaviour, 'model.pseudo_labels')
        num_classes = _num_classes(student)
        threshold = self.options.thresholds(num_classes, 'model.pseudo_labels')
        self.register_buffer('threshold', threshold, persistent=False)  # on the device, so that no step copies it there
        self.lowest = threshold.min().item()
        self.statistics = BoxStatistics(num_classes)

    def loss(
        self, student: nn.Module, mean_teacher: MeanTeacher, inputs: dict[str, Tensor], data_samples: dict[str, list]
    ) -> Tensor:
        """The student's loss on the target view, labelled by the teacher; scalar."""
        images, samples = inputs['target'], data_samples['target']
        seen = data_samples.get('teacher', samples)
        found = mean_teacher.run(lambda model: self._predict(model, inputs.get('teacher', images), seen))
        pseudo = [
            _to_target(self._select(one.pred_instances, first.img_shape), first, second)
            for one, first, second in zip(found, seen, samples, strict=True)
        ]
        for one, sample in zip(pseudo, samples, strict=True):
            self.statistics.update(one, candidates=0, truth=_truth(sample))
        weight = 1.0
        if not any(map(len, pseudo)):
            weight = float(self.options.empty != 'skip')
            if self.options.empty == 'artificial_box':
                # the state of this generator is in every checkpoint
                pseudo[0] = artificial_box(samples[0].img_shape[:2], torch.default_generator, pseudo[0].boxes)
        elif self.options.weighting == 'score':
            weight = torch.cat([one.weights for one in pseudo]).mean()
        # Also where the weight is 0: heads exchange the number of objects between processes, and one that stayed away
        # would be waited for.
        losses = student(images, _labelled(samples, pseudo, data_samples), mode='loss')
        return weight * student.parse_losses(losses)[0]

    def _predict(self, model: nn.Module, images: Tensor, samples: list) -> list:
        with self._own_thresholds(model):
            return model.predict(images, samples, rescale=False)

    @contextmanager
    def _own_thresholds(self, model: nn.Module) -> Iterator[None]:
        """Inside, the head that predicts has the thresholds of the pseudo labels, and no more boxes to suppress."""
        head = getattr(model, 'roi_head', None) or model.bbox_head
        own = head.test_cfg
        if own and 'nms' in own:  # the DETR family has neither threshold nor suppression
            nms = dict(type='nms', iou_threshold=self.options.iou_threshold)
            head.test_cfg = ConfigDict(dict(own, score_thr=self.lowest, nms=nms, max_per_img=_ALL))
        try:
            yield
        finally:
            head.test_cfg = own

    def _select(self, instances: Any, size: tuple[int, ...]) -> PseudoBoxes:
        """Of the predictions of an image of ``size`` ``(H, W)``."""
        from mmdet.structures.bbox import get_box_tensor

        boxes = get_box_tensor(instances.bboxes).float()
        boxes = torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], 1)
        large = (boxes[:, 2:] - boxes[:, :2] >= _MIN_SIDE).all(1)
        scores = instances.scores.float().where(large, 0)  # 0 passes no threshold
        rules = self.options
        return select_boxes(
            boxes, scores, instances.labels, self.threshold, rules.iou_threshold, rules.max_count, rules.weighting
        )


def _to_target(pseudo: PseudoBoxes, seen: Any, sample: Any) -> PseudoBoxes:
    """``pseudo`` of the teacher's view ``seen`` in the target view ``sample``; as they are where both agree."""
    sizes = [tuple(view.img_shape[:2]) for view in (seen, sample)]
    first, second = (view.metainfo.get('homography_matrix') for view in (seen, sample))
    known = first is not None and second is not None
    if not known:
        if found := difference(sample, seen):
            raise ConfigError(
                f'train_dataloader.dataset.target.pipeline: the views target and teacher of an image have the {found}; '
                "put geometric transforms under Views.shared, or 'homography_matrix' among the meta_keys of the "
                'PackDetInputs of both'
            )
        return pseudo
    if sizes[0] == sizes[1] and np.array_equal(first, second):
        return pseudo
    return warp_pseudo_boxes(pseudo, between_views(first, second), sizes[1], _MIN_SIDE)


def _truth(sample: Any) -> tuple[Tensor, Tensor] | None:
    """Boxes and labels of an image that happens to have them; for statistics only."""
    from mmdet.structures.bbox import get_box_tensor

    instances = sample.get('gt_instances')
    if instances is None or 'bboxes' not in instances or 'labels' not in instances:
        return None
    return get_box_tensor(instances.bboxes), instances.labels


def _labelled(samples: list, pseudo: list[PseudoBoxes], data_samples: dict[str, list]) -> list:
    """``samples`` under pseudo labels, in the kind of boxes that the labels of the source have."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import BaseBoxes
    from mmengine.structures import InstanceData

    kind = type(data_samples['source'][0].gt_instances.bboxes)
    wrap = kind if issubclass(kind, BaseBoxes) else lambda boxes: boxes
    return [
        DetDataSample(
            metainfo=sample.metainfo, gt_instances=InstanceData(bboxes=wrap(one.boxes), labels=one.labels.long())
        )
        for sample, one in zip(samples, pseudo, strict=True)
    ]


def _num_classes(student: nn.Module) -> int:
    head = student.roi_head.bbox_head if getattr(student, 'roi_head', None) is not None else student.bbox_head
    return (head[-1] if isinstance(head, nn.ModuleList) else head).num_classes  # the last one of a cascade predicts


def _check_student(student: nn.Module) -> None:
    name = type(student).__name__
    if getattr(student, 'with_mask', False) or hasattr(getattr(student, 'bbox_head', None), 'loss_mask'):
        raise ConfigError(
            f'student: {name} predicts masks, which mean-teacher adaptation makes no pseudo labels of; use its '
            'counterpart that predicts boxes alone, such as FasterRCNN for MaskRCNN'
        )
    augments = getattr(student.data_preprocessor, 'batch_augments', None) or []
    if any(type(augment).__name__ == 'BatchSyncRandomResize' for augment in augments):
        raise ConfigError(
            'student.data_preprocessor.batch_augments: BatchSyncRandomResize may draw one size for one view of an '
            'image and another for the next; set batch_augments=None and put a RandomResize under Views.shared'
        )
