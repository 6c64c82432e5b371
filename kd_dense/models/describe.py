"""What kd_dense knows about the models of MMSegmentation and MMDetection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kd_dense.description import Description, Logits
from kd_dense.teacher import Normalization

#: Dense heads whose class output is no logit per position and class.
_NO_LOGITS = {
    'TOODHead': 'TOODHead gives aligned class probabilities, not logits',
    'YOLOV3Head': 'YOLOV3Head packs classes, objectness and boxes into one map',
    'CenterNetHead': 'CenterNetHead gives a heat map after the sigmoid',
    'CornerHead': 'CornerHead predicts corners, not boxes with classes',
    'CentripetalHead': 'CentripetalHead predicts corners, not boxes with classes',
    'GroundingDINOHead': 'GroundingDINOHead scores words of a prompt, not classes',
}
_INSTEAD = "; distil features (taps='neck' or 'backbone:3') instead"


def describe(model: nn.Module, probe_size: tuple[int, int] | None = None) -> Description:
    """Describe a segmentor of MMSegmentation or a detector of MMDetection.

    Args:
        probe_size: ``(H, W)`` of the made-up image of the dry forward; ``None``: the fixed size of the model's data
            preprocessor where it has one, else 320 x 320.
    """
    logits, tap = _logits(model)
    aliases = {'logits': [tap], 'branch_logits': [tap]} if isinstance(logits, Logits) else {}
    return Description(model, dry_run(model, probe_size), aliases, logits)


def dry_run(model: nn.Module, size: tuple[int, int] | None = None) -> Callable[[], tuple[int, int]]:
    """A function that runs the model in tensor mode on one made-up image and returns the image's size."""

    def run() -> tuple[int, int]:
        preprocessor = getattr(model, 'data_preprocessor', None)
        h, w = size or getattr(preprocessor, 'size', None) or (320, 320)
        mean = getattr(preprocessor, 'mean', None)
        channels = mean.numel() if isinstance(mean, torch.Tensor) and mean.numel() > 1 else _input_channels(model)
        device = next(model.parameters()).device
        images = torch.zeros(1, channels, h, w, device=device)
        model(images, made_up_samples(model, 1, (h, w)), mode='tensor')
        return h, w

    return run


def made_up_samples(model: nn.Module, count: int, size: tuple[int, int]) -> list | None:
    """Data samples with the image sizes that two-stage and query-based detectors ask for; segmentors need none."""
    if is_segmentor(model):
        return None
    from mmdet.structures import DetDataSample

    meta = dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0), img_id=0
    )
    return [DetDataSample(metainfo=meta) for _ in range(count)]


def is_segmentor(model: nn.Module) -> bool:
    """Does the model come from MMSegmentation (or is built like its segmentors)?"""
    return hasattr(model, 'decode_head')


def _input_channels(model: nn.Module) -> int:
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return convolution.in_channels if convolution is not None else 3


def _logits(model: nn.Module) -> tuple[Logits | str, str]:
    """How to read the class logits, and their tap; or a sentence, and nothing."""
    if is_segmentor(model):
        return _segmentor_logits(model)
    if hasattr(model, 'roi_head'):
        return 'the class predictions of a two-stage detector belong to its proposals, not to positions' + _INSTEAD, ''
    head = getattr(model, 'bbox_head', None)
    if head is None:
        return f'{type(model).__name__} has no bbox_head' + _INSTEAD, ''
    for cls in type(head).__mro__:
        if cls.__name__ in _NO_LOGITS:
            return _NO_LOGITS[cls.__name__] + _INSTEAD, ''
    classes = getattr(head, 'cls_out_channels', None)
    if classes is None:
        return f'{type(head).__name__} does not say how many class channels it has' + _INSTEAD, ''
    sigmoid = getattr(head, 'use_sigmoid_cls', None)
    if sigmoid is None:
        sigmoid = getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
    layout = 'query' if hasattr(model, 'num_queries') else 'map'
    return Logits(classes, 'sigmoid' if sigmoid else 'softmax', layout), 'bbox_head:0'


def _segmentor_logits(model: nn.Module) -> tuple[Logits | str, str]:
    head, path = model.decode_head, 'decode_head'
    if isinstance(head, nn.ModuleList):  # a cascade: the last head is the one that predicts
        path = f'decode_head.{len(head) - 1}'
        head = head[-1]
    name = type(head).__name__
    classes = getattr(head, 'out_channels', None)
    if classes is None or not hasattr(head, 'num_classes'):
        return f'{name} is no decode head with a logit per pixel and class' + _INSTEAD, ''
    if name == 'SegmenterMaskTransformerHead':
        tap = path
    elif isinstance(getattr(head, 'conv_seg', None), nn.Module):
        # The convolution, not the head: some heads return more than the logits, and in training other things than in
        # evaluation.
        tap = f'{path}.conv_seg'
    else:
        return f'{name} has no conv_seg that gives a logit per pixel and class' + _INSTEAD, ''
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    sigmoid = classes == 1 or any(getattr(loss, 'use_sigmoid', False) for loss in losses)
    return Logits(classes, 'sigmoid' if sigmoid else 'softmax'), tap


def normalization(model: nn.Module) -> Normalization | None:
    """How the model's data preprocessor normalises; ``None`` when it does not, or there is none."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    if mean is None or std is None or not getattr(preprocessor, '_enable_normalize', True):
        return None
    # OpenMMLab reads images as BGR; a preprocessor that converts turns them into RGB.
    converts = getattr(preprocessor, '_channel_conversion', None)
    if converts is None:
        converts = getattr(preprocessor, 'channel_conversion', False)
    return Normalization(tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), 'rgb' if converts else 'bgr')
