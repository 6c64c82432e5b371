"""The dense heads of MMDetection: how to read the boxes that they predict cell by cell."""

from __future__ import annotations

from torch import nn

from kd_dense.description import Boxes

_INSTEAD = "; distil features (taps='neck') instead"
#: Heads whose second output is no box of each cell and anchor, or not one that can be read without the head.
_NO_BOXES = {
    'YOLOV3Head': 'YOLOV3Head packs classes, objectness and boxes into one map',
    'CenterNetHead': 'CenterNetHead predicts the size of a box and the place of its centre in separate maps',
    'CornerHead': 'CornerHead predicts corners, not boxes',
    'RepPointsHead': 'RepPointsHead predicts sets of points, not boxes',
    'SABLRetinaHead': 'SABLRetinaHead predicts buckets along the sides of a box',
    'GuidedAnchorHead': 'GuidedAnchorHead predicts its anchors, so those of two models differ',
    'YOLACTHead': 'YOLACTHead runs a different number of times in training than in the plain forward',
    'CondInstBboxHead': 'CondInstBboxHead runs a different number of times in training than in the plain forward',
}


def describe_boxes(model: nn.Module, training: bool) -> tuple[Boxes | str, dict[str, list[str]], dict[str, str]]:
    """What the :class:`~kd_dense.description.Description` of a model of OpenMMLab says about its boxes.

    Args:
        training: see :func:`~kd_dense.models.describe.describe`; some heads return other units in training.

    Returns:
        ``boxes``, and what there is to add to ``aliases`` and ``absent``.
    """
    head = getattr(model, 'bbox_head', None)
    if hasattr(model, 'decode_head'):
        found = 'a segmentor predicts no boxes'
    elif hasattr(model, 'roi_head'):
        found = 'the boxes of a two-stage detector belong to its proposals, not to cells; distil them with RoIKD'
    elif hasattr(model, 'num_queries'):
        found = 'the boxes of a detection transformer belong to its queries, not to cells; distil them with QueryKD'
    elif head is None:
        found = f'{type(model).__name__} has no bbox_head' + _INSTEAD
    else:
        found = _dense(head, training)
    if isinstance(found, str):
        return found, {}, {'boxes': found}
    # VFNet refines its boxes, and gives the unrefined ones as well in training
    tap = 'bbox_head:2' if training and 'VFNetHead' in _classes(head) else 'bbox_head:1'
    return found, {'boxes': [tap]}, {}


def _dense(head: nn.Module, training: bool) -> Boxes | str:
    classes, kind = _classes(head), type(head).__name__
    for name, reason in _NO_BOXES.items():
        if name in classes:
            return reason + _INSTEAD
    generator = getattr(head, 'prior_generator', None)
    strides = [pair if isinstance(pair, (tuple, list)) else (pair, pair) for pair in getattr(generator, 'strides', [])]
    if not strides or any(width != height for width, height in strides):
        return f'{kind} does not say which strides its levels have, or they are not the same in x and y' + _INSTEAD
    levels = dict(
        strides=tuple(float(width) for width, _ in strides),
        anchors=tuple(tuple(map(tuple, level.tolist())) for level in getattr(generator, 'base_anchors', [])),
        offset=getattr(generator, 'offset', 0.5),
    )
    if 'GFLHead' in classes:
        return Boxes('distribution', bins=head.reg_max + 1, **levels)
    if 'TOODHead' in classes:
        return Boxes('corners', **levels)
    if 'YOLOXHead' in classes:
        return Boxes('delta', **levels)
    if classes & {'RTMDetHead', 'VFNetHead', 'AutoAssignHead'}:
        return Boxes('distance', unit='pixel', **levels)
    if classes & {'FCOSHead', 'CenterNetUpdateHead'}:
        # normalised by the stride, which evaluation multiplies in
        strided = training and ('CenterNetUpdateHead' in classes or head.norm_on_bbox)
        return Boxes('distance', unit='stride' if strided else 'pixel', **levels)
    coder = getattr(head, 'bbox_coder', None)
    if type(coder).__name__ != 'DeltaXYWHBBoxCoder' or coder.add_ctr_clamp or not levels['anchors']:
        return f'the boxes of {kind} are encoded in a way of its own ({type(coder).__name__})' + _INSTEAD
    return Boxes('delta', means=tuple(map(float, coder.means)), stds=tuple(map(float, coder.stds)), **levels)


def _classes(head: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(head).__mro__}
