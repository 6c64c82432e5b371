"""The RoI heads of MMDetection: how to read what they predict, and how to ask a teacher's about given regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_dense.description import ROI_TAPS, RoIStage

_INSTEAD = "; distil features (taps='neck') instead"


def describe_rois(model: nn.Module) -> tuple[tuple[RoIStage, ...] | str, dict[str, list[str]], dict[str, str]]:
    """What the :class:`~kd_dense.description.Description` of a two-stage detector says about its RoI head.

    Returns:
        ``rois``, and what there is to add to ``aliases`` and ``absent``.
    """
    head = model.roi_head
    boxes, masks = _stages(head, 'bbox_head'), _stages(head, 'mask_head')
    for reason in (_unreadable(head), *map(_unreadable_boxes, boxes)):
        if reason:
            return reason + _INSTEAD, {}, {}
    absent = {}
    if getattr(model, 'rpn_head', None) is None:
        reason = f'{type(model).__name__} gets its proposals with its images, which the dry forward has not'
        absent = dict.fromkeys((tap for tap in ROI_TAPS if tap != 'roi_features'), reason + _INSTEAD)
    reason = _unreadable_masks(model, masks)
    stages = [f'.{i}' for i in range(len(boxes))] if _is_cascade(head) else ['']
    aliases = {
        'rois': [f'roi_head.bbox_roi_extractor{stage}@rois' for stage in stages],
        'classes@rois': [f'roi_head.bbox_head{stage}:0' for stage in stages],
        'deltas@rois': [f'roi_head.bbox_head{stage}:1' for stage in stages],
        'roi_features': ['backbone' if getattr(model, 'neck', None) is None else 'neck'],
    }
    if reason:
        return _read(head, boxes, []), aliases, dict.fromkeys(('mask_rois', 'masks@mask_rois'), reason) | absent
    aliases['mask_rois'] = [f'roi_head.mask_roi_extractor{stage}@rois' for stage in stages]
    aliases['masks@mask_rois'] = [f'roi_head.mask_head{stage}' for stage in stages]
    return _read(head, boxes, masks), aliases, absent


def _read(head: nn.Module, boxes: list[nn.Module], masks: list[nn.Module]) -> tuple[RoIStage, ...]:
    weights = head.stage_loss_weights if _is_cascade(head) else [1.0]
    assigners = getattr(head, 'bbox_assigner', None)
    assigners = assigners if isinstance(assigners, list) else [assigners]
    assigners = assigners if len(assigners) == len(boxes) else [None] * len(boxes)  # none without a train_cfg
    return tuple(
        RoIStage(
            box.num_classes,
            box.reg_class_agnostic,
            tuple(map(float, box.bbox_coder.means)),
            tuple(map(float, box.bbox_coder.stds)),
            float(getattr(assigner, 'pos_iou_thr', 0.5)),
            float(weight),
            masks[i].class_agnostic if masks else None,
        )
        for i, (box, weight, assigner) in enumerate(zip(boxes, weights, assigners, strict=True))
    )


def _is_cascade(head: nn.Module) -> bool:
    return hasattr(head, 'num_stages')


def _stages(head: nn.Module, name: str) -> list[nn.Module]:
    found = getattr(head, name, None)
    return list(found) if isinstance(found, nn.ModuleList) else [found] if found is not None else []


def _unreadable(head: nn.Module) -> str:
    """Why the predictions of this RoI head can not be had for given regions; nothing if they can."""
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead, TridentRoIHead

    name = type(head).__name__
    known = (StandardRoIHead._bbox_forward, CascadeRoIHead._bbox_forward)
    if getattr(type(head), '_bbox_forward', None) not in known or not hasattr(head, 'bbox_head'):
        return f'{name} does not predict class and box from the features of one region alone, in one call'
    if isinstance(head, TridentRoIHead):
        return f'{name} trains on several copies of each image, which the teacher does not see'
    return ''


def _unreadable_boxes(box: nn.Module) -> str:
    name = type(box).__name__
    if not (getattr(box, 'with_cls', False) and getattr(box, 'with_reg', False)):
        return f'{name} does not give class logits and box deltas'
    if box.custom_cls_channels or getattr(box.loss_cls, 'use_sigmoid', False):
        return f'the classes of {name} with {type(box.loss_cls).__name__} are no softmax with a background class'
    coder = type(box.bbox_coder).__name__
    if coder != 'DeltaXYWHBBoxCoder':
        return f'the boxes of {name} are encoded by {coder}, not by DeltaXYWHBBoxCoder'
    return ''


def _unreadable_masks(model: nn.Module, masks: list[nn.Module]) -> str:
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead

    head = model.roi_head
    if not masks:
        return f'{type(model).__name__} has no mask head; leave mask_weight at 0'
    if head.share_roi_extractor:
        return (
            f'{type(model).__name__} takes the features of its boxes for its masks, so that their regions are not '
            'known; leave mask_weight at 0'
        )
    known = (StandardRoIHead._mask_forward, CascadeRoIHead._mask_forward)
    if type(head)._mask_forward not in known or not all(hasattr(mask, 'class_agnostic') for mask in masks):
        return f'{type(masks[0]).__name__} in {type(head).__name__} gives no logits per pixel; leave mask_weight at 0'
    return ''


class TeacherRoIs:
    """A :class:`~kd_dense.context.TeacherRoIs`: the RoI head of a frozen detector at the student's regions.

    It is asked about regions after the student's forward; the teacher's own proposals are never made.

    Args:
        model: the teacher, a two-stage detector.
        scale: size of its input relative to the student's.
    """

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        self._head, self._scale = model.roi_head, scale

    def boxes(self, features: list[Tensor], rois: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """See :class:`~kd_dense.context.TeacherRoIs`."""
        with torch.no_grad():
            results = self._head._bbox_forward(*self._stage(stage), tuple(features), self._scaled(rois))
        return results['cls_score'], results['bbox_pred']

    def masks(self, features: list[Tensor], rois: Tensor, stage: int) -> Tensor:
        """See :class:`~kd_dense.context.TeacherRoIs`."""
        with torch.no_grad():
            return self._head._mask_forward(*self._stage(stage), tuple(features), self._scaled(rois))['mask_preds']

    def _stage(self, stage: int) -> tuple[int, ...]:
        return (stage,) if _is_cascade(self._head) else ()

    def _scaled(self, rois: Tensor) -> Tensor:
        return rois if self._scale == 1 else torch.cat([rois[:, :1], rois[:, 1:] * self._scale], 1)
