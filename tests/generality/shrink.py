"""The toolboxes' own model configs at a fraction of their width, and one training step of them with a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub

from kd_dense import Distillation
from kd_dense.models.build import build_model, forget_pretrained

#: Of the made-up images.
SIZE = (128, 128)
#: Keys with a number of channels, or a list of them, besides all that contain ``channel``.
WIDTHS = ('embed_dims', 'embed_dim', 'num_feats', 'hidden_dim', 'num_deconv_filters', 'rfp_inplanes')
#: Keys with a number of queries or proposals; their models select them among the positions of a large image.
QUERIES = ('num_queries', 'num_query', 'num_proposals', 'sos_token_num')
_RESNETS = ('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt', 'ResNeSt', 'Res2Net', 'TridentResNet', 'DetectoRS_ResNet')
_DETR_HEADS = ('DETRHead', 'DeformableDETRHead', 'ConditionalDETRHead', 'DABDETRHead', 'DINOHead', 'DDQDETRHead')
#: Types whose configs do not state their width -> where to write it, and its default.
IMPLICIT = {
    **{name: dict(base_channels=64, stem_channels=64) for name in _RESNETS},
    **{name: dict(embed_dims=256) for name in _DETR_HEADS},
    'PyramidVisionTransformer': dict(embed_dims=64),
    'HourglassNet': dict(feat_channel=256, stage_channels=(256, 256, 384, 384, 384, 512)),
    'CSPDarknet': dict(widen_factor=1.0),
    'CSPNeXt': dict(widen_factor=1.0),
}


def narrow(model: Mapping, factor: int) -> ConfigDict:
    """A copy of a model config with every width divided by ``factor``, without pretrained weights."""
    model = ConfigDict(copy.deepcopy(dict(model)))
    forget_pretrained(model)
    _narrow(model, factor)
    return model


def _narrow(node: Any, factor: int) -> None:
    if isinstance(node, dict):
        kind = str(node.get('type', '')).rpartition('.')[2]
        for key, value in IMPLICIT.get(kind, {}).items():
            node.setdefault(key, value)
        for key, value in list(node.items()):
            if key == 'num_groups':  # of group norm, which has to divide the width
                node[key] = 1
            elif key == 'img_size':  # of position embeddings
                node[key] = SIZE
            elif key == 'widen_factor':
                node[key] = value / factor
            elif key in QUERIES:
                node[key] = 20
            elif 'channel' in key or key in WIDTHS:
                node[key] = _divided(value, factor)
            else:
                _narrow(value, factor)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _narrow(value, factor)


def _divided(value: Any, factor: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if value <= 4 else max(value // factor, 1)  # 3 are colours
    if isinstance(value, (list, tuple)):
        return type(value)(_divided(v, factor) for v in value)
    if isinstance(value, dict):
        return {k: _divided(v, factor) for k, v in value.items()}
    return value


def read(toolbox: str, path: str, size: tuple[int, int] = SIZE) -> ConfigDict:
    """The model section of a config that the installed toolbox brings along, its preprocessor included."""
    import importlib

    folder = Path(importlib.import_module(toolbox).__file__).parent / '.mim' / 'configs'
    cfg = Config.fromfile(str(folder / path))
    model = cfg.model
    if 'data_preprocessor' not in model and 'data_preprocessor' in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    model['_scope_'] = toolbox
    if 'batch_augments' in model.data_preprocessor:  # they resize and pad; the made-up images stay as they are
        model.data_preprocessor.batch_augments = None
    if toolbox == 'mmseg':
        model.data_preprocessor.pop('size_divisor', None)
        model.data_preprocessor.size = size
    return model


def one_step(
    student: Mapping, teacher: Mapping, distillers: dict, batch: dict, size: tuple[int, int] = SIZE, init: bool = False
) -> dict:
    """Build both, take one training step; see :func:`join` and :func:`step`."""
    return step(join(student, teacher, distillers, size, init), batch)


def join(
    student: Mapping, teacher: Mapping, distillers: dict, size: tuple[int, int] = SIZE, init: bool = False
) -> Distillation:
    """Build both.

    Args:
        size: of the image of the dry forward.
        init: initialise them as their configs say, which sets many weights to 0, and with them gradients.
    """
    torch.manual_seed(0)
    teacher = build_model(teacher, 'teacher')
    model = Distillation(student=student, teacher=teacher, distillers=distillers, probe_size=size).train()
    if init:
        model.init_weights()
        teacher.init_weights()
    model.progress = 0.0
    return model


def step(model: Distillation, batch: dict) -> dict:
    """One training step, without an optimizer.

    Returns:
        ``losses``: name -> number; ``student`` and ``connectors``: name -> sum of absolute gradients, ``None`` without;
        ``modules``: names of the classes in the student; ``canvas``: size of the batch that student and teacher saw.
    """
    model.zero_grad()
    for name in ('epoch', 'iter'):  # the runner does it; TOOD and the resizing of whole batches read them
        MessageHub.get_current_instance().update_info(name, 0)
    data = model.data_preprocessor(batch, True)
    total, logged = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    model.distillers.verify_gradients()

    def gradients(module: torch.nn.Module) -> dict:
        return {
            name: None if p.grad is None else float(p.grad.abs().sum())
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    return dict(
        losses={name: float(value.mean()) for name, value in logged.items()},
        student=gradients(model.student),
        connectors=gradients(model.distillers),
        modules={type(m).__name__ for m in model.student.modules()},
        canvas=tuple(data['inputs'].shape[2:]),
    )


def segmentation_batch(classes: int, size: tuple[int, int] = SIZE) -> dict:
    """Two images with a class for every pixel, none ignored (some losses reject that), and edges for PIDNet."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(1)
    samples = []
    for _ in range(2):
        labels = torch.randint(0, classes, (1, size[0] // 16, size[1] // 16)).repeat_interleave(16, 1)
        labels = labels.repeat_interleave(16, 2)
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=size, ori_shape=size))
        sample.gt_edge_map = PixelData(data=(torch.rand(1, *size) > 0.9).long())
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(2)], data_samples=samples)


def detection_batch(
    classes: int,
    stuff: int = 0,
    size: tuple[int, int] = SIZE,
    masks: bool = True,
    sizes: Sequence[tuple[int, int]] | None = None,
    counts: tuple[int, int] = (3, 3),
) -> dict:
    """Two images with boxes, masks, proposals and, where the model segments everything, a class for every pixel.

    Args:
        sizes: of the two images where they differ; at least 110 pixels.
        counts: objects in either, at most 3.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    torch.manual_seed(1)
    samples = []
    sizes = sizes or (size, size)
    for i, size in enumerate(sizes):
        corner = torch.rand(3, 2) * 40
        boxes = torch.cat([corner, corner + 30 + torch.rand(3, 2) * 40], 1)
        filled = torch.zeros(3, *size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(filled, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        instances = InstanceData(bboxes=boxes, labels=torch.randint(0, classes, (3,)))
        if masks:
            instances.masks = BitmapMasks(filled.numpy(), *size)
        instances = instances[: counts[i]]
        sample = DetDataSample(
            gt_instances=instances,
            ignored_instances=instances[:0],
            proposals=InstanceData(bboxes=boxes + torch.randn_like(boxes) * 3),
            metainfo=dict(
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                batch_input_shape=size,
                scale_factor=(1.0, 1.0),
                img_id=i,
            ),
        )
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, max(stuff, 1), (1, *size)) + (classes if stuff else 0))
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in sizes], data_samples=samples)
