"""What kd_dense knows about the models of MMSegmentation and MMDetection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kd_dense.description import Description, Logits, Queries
from kd_dense.models.boxes import describe_boxes
from kd_dense.models.rois import describe_rois
from kd_dense.teacher import Normalization

#: Dense heads whose class output is no logit per position and class.
_NO_LOGITS = {
    'TOODHead': "TOODHead gives aligned class probabilities, not logits (LocalizationKD works with scores='none')",
    'YOLOV3Head': 'YOLOV3Head packs classes, objectness and boxes into one map',
    'CenterNetHead': 'CenterNetHead gives a heat map after the sigmoid',
    'CornerHead': 'CornerHead predicts corners, not boxes with classes',
    'CentripetalHead': 'CentripetalHead predicts corners, not boxes with classes',
    'GroundingDINOHead': 'GroundingDINOHead scores words of a prompt, not classes',
    'YOLACTHead': 'YOLACTHead runs a different number of times in training than in the plain forward',
    'CondInstBboxHead': 'CondInstBboxHead runs a different number of times in training than in the plain forward',
}
#: What the batch or chance changes, and no tensor's shape: left in evaluation mode in the dry forward.
_BATCH_DEPENDENT = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
_INSTEAD = "; distil features (taps='neck' or 'backbone:3') instead"


def describe(model: nn.Module, probe_size: tuple[int, int] | None = None, training: bool = False) -> Description:
    """Describe a segmentor of MMSegmentation or a detector of MMDetection.

    Args:
        probe_size: ``(H, W)`` of the made-up image of the dry forward; ``None``: the fixed size of the model's data
            preprocessor where it has one, else 320 x 320.
        training: the taps will be read in training, as those of a student are; of a teacher, in evaluation.
    """
    logits, tap = _logits(model)
    aliases = {'logits': [tap], 'branch_logits': [tap]} if isinstance(logits, Logits) else {}
    absent = {}
    embeddings = _patch_embeddings(model)
    if embeddings:
        aliases['patch_embeddings'] = embeddings
    else:
        kind = type(getattr(model, 'backbone', None)).__name__
        absent['patch_embeddings'] = (
            f'{kind} is none of the backbones with one patch embedding for each stage (MiT, PVT, Swin); name the '
            'modules whose outputs enter its stages'
        )
    # Some modules return other things in training than in evaluation, and some heads ask for ground truth in training
    # or always: what is closest to the forward that will be tapped comes first.
    modes = [True, False] if training else [False]
    run, *others = [dry_run(model, probe_size, mode, features) for features in (False, True) for mode in modes]
    rois = Description.rois
    if getattr(model, 'roi_head', None) is not None:
        rois, more_aliases, more_absent = describe_rois(model)
        aliases |= more_aliases
        absent |= more_absent
    queries, more_aliases = _queries(model, training)
    aliases |= more_aliases
    boxes, more_aliases, more_absent = describe_boxes(model, training)
    aliases |= more_aliases
    absent |= more_absent
    return Description(model, run, aliases, logits, absent, normalization(model), tuple(others), rois, queries, boxes)


def probe_canvas(model: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """``(H, W)`` of a made-up image for ``model``: ``size``, or that of its data preprocessor, or 320 x 320."""
    return size or getattr(getattr(model, 'data_preprocessor', None), 'size', None) or (320, 320)


def dry_run(
    model: nn.Module, size: tuple[int, int] | None = None, training: bool = False, features: bool = False
) -> Callable[[], tuple[int, int]]:
    """A function that runs the model in tensor mode on one made-up image and returns the image's size.

    Args:
        training: as in training, but for normalisation and dropout.
        features: only as far as the features, backbone and neck.
    """

    def run() -> tuple[int, int]:
        h, w = probe_canvas(model, size)
        device = next(model.parameters()).device
        images = torch.zeros(1, input_channels(model), h, w, device=device)
        if training:
            for module in model.modules():
                module.training = not isinstance(module, _BATCH_DEPENDENT)
        try:
            if features:
                model.extract_feat(images)
            else:
                model(images, made_up_samples(model, 1, (h, w)), mode='tensor')
        finally:
            if training:
                model.eval()
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


def _patch_embeddings(model: nn.Module) -> list[str]:
    """The modules that give the tokens that enter each stage of a hierarchical transformer; none for others."""
    backbone = getattr(model, 'backbone', None)
    stages = getattr(backbone, 'layers', None)  # MiT and PVT: patch embedding, blocks and norm of each stage
    if isinstance(stages, nn.ModuleList) and all(
        isinstance(stage, nn.ModuleList) and type(stage[0]).__name__ == 'PatchEmbed' for stage in stages
    ):
        return [f'backbone.layers.{i}.0' for i in range(len(stages))]
    stages = getattr(backbone, 'stages', None)  # Swin: the end of a stage makes the tokens of the next
    if isinstance(stages, nn.ModuleList) and hasattr(backbone, 'patch_embed'):
        merging = [i for i, stage in enumerate(stages) if getattr(stage, 'downsample', None) is not None]
        return ['backbone.patch_embed', *(f'backbone.stages.{i}.downsample' for i in merging)]
    return []


def is_segmentor(model: nn.Module) -> bool:
    """Does the model come from MMSegmentation (or is built like its segmentors)?"""
    return hasattr(model, 'decode_head')


def is_detector(model: nn.Module) -> bool:
    """Is the model one of MMDetection's that predict boxes?"""
    known = any(cls.__name__ == 'BaseDetector' for cls in type(model).__mro__)
    return known and any(getattr(model, head, None) is not None for head in ('bbox_head', 'roi_head'))


def input_channels(model: nn.Module) -> int:
    """Channels of the images that ``model`` takes."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if isinstance(mean, torch.Tensor) and mean.numel() > 1:
        return mean.numel()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            stem = type(model.get_submodule(name.rpartition('.')[0].rpartition('.')[0])).__name__
            # YOLOX begins with taking four neighbouring pixels for the channels of one
            return module.in_channels // 4 if stem == 'Focus' else module.in_channels
    return 3


def _logits(model: nn.Module) -> tuple[Logits | str, str]:
    """How to read the class logits, and their tap; or a sentence, and nothing."""
    if is_segmentor(model):
        return _segmentor_logits(model)
    if hasattr(model, 'roi_head'):
        reason = 'the class predictions of a two-stage detector belong to its proposals, not to positions'
        return f"{reason}; distil them with RoIKD, or features with taps='neck'", ''
    head = getattr(model, 'bbox_head', None)
    if head is None:
        return f'{type(model).__name__} has no bbox_head' + _INSTEAD, ''
    for cls in type(head).__mro__:
        if cls.__name__ in _NO_LOGITS:
            return _NO_LOGITS[cls.__name__] + _INSTEAD, ''
    if getattr(model, 'as_two_stage', False):
        reason = f'the queries of a two-stage {type(model).__name__} are chosen anew in each image'
        return f"{reason}, so they have to be matched; distil them with QueryKD, or features with taps='neck'", ''
    classes = getattr(head, 'cls_out_channels', None)
    if classes is None:
        return f'{type(head).__name__} does not say how many class channels it has' + _INSTEAD, ''
    sigmoid = getattr(head, 'use_sigmoid_cls', None)
    if sigmoid is None:
        sigmoid = getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
    layout = 'query' if hasattr(model, 'num_queries') else 'map'
    return Logits(classes, 'sigmoid' if sigmoid else 'softmax', layout), 'bbox_head:0'


def _queries(model: nn.Module, training: bool) -> tuple[Queries | str, dict[str, list[str]]]:
    """How to read the set of objects that a DETR predicts, and its aliases; or a sentence, and nothing."""
    if not any(cls.__name__ == 'DetectionTransformer' for cls in type(model).__mro__):
        return f"{type(model).__name__} is none of MMDetection's DETR family: {Description.queries}", {}
    head = model.bbox_head
    kinds = [cls.__name__ for cls in type(head).__mro__]
    if 'GroundingDINOHead' in kinds:
        return _NO_LOGITS['GroundingDINOHead'] + _INSTEAD, {}
    if 'DDQDETRHead' in kinds and training:
        return 'the head of DDQDETR predicts with further, dense queries in training; it can only be a teacher', {}
    sigmoid = getattr(head.loss_cls, 'use_sigmoid', False)
    levels = 'neck' if getattr(model, 'neck', None) is not None else 'backbone'
    # Deformable encoders read all levels, the others the last one only.
    levels = levels if hasattr(model, 'num_feature_levels') else f'{levels}:-1'
    aliases = dict(
        query_logits=['bbox_head:0'], query_boxes=['bbox_head:1'], encoder_memory=['encoder'], encoder_levels=[levels]
    )
    return Queries(model.num_queries, head.num_classes, 'sigmoid' if sigmoid else 'softmax'), aliases


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
    return Normalization(tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), channel_order(model))


def image_normalization(model: nn.Module) -> Normalization:
    """As :func:`normalization`; a model that does not normalise (YOLOX, say) is given pixel values, 0..255."""
    count = input_channels(model)
    plain = Normalization((0.0,) * count, (1.0,) * count, channel_order(model))
    return normalization(model) or plain


def channel_order(model: nn.Module) -> str:
    """``'rgb'`` or ``'bgr'``: the channels of what the model sees behind its data preprocessor."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    # OpenMMLab reads images as BGR; a preprocessor that converts turns them into RGB.
    converts = getattr(preprocessor, '_channel_conversion', None)
    if converts is None:
        converts = getattr(preprocessor, 'channel_conversion', False)
    return 'rgb' if converts else 'bgr'
