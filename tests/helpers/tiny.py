"""Real models and data of the toolboxes, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kd_dense.data.scenes import generate

SIZE = (64, 64)
NORM = dict(type='BN', requires_grad=True)
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def segmentor(width: int = 4, classes: int = 7, **head: Any) -> dict:
    """An mmseg ``EncoderDecoder``: ResNet-18 of ``width`` channels and a multi-scale head."""
    return dict(
        type='EncoderDecoder',
        _scope_='mmseg',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, size=SIZE, pad_val=0, seg_pad_val=255
        ),
        backbone=dict(
            type='ResNetV1c',
            depth=18,
            stem_channels=width,
            base_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            strides=(1, 2, 2, 2),
            dilations=(1, 1, 1, 1),
            norm_cfg=NORM,
            norm_eval=False,
            style='pytorch',
        ),
        decode_head=dict(
            dict(
                type='SegformerHead',
                in_channels=[width, width * 2, width * 4, width * 8],
                in_index=[0, 1, 2, 3],
                channels=16,
                dropout_ratio=0.1,
                num_classes=classes,
                norm_cfg=NORM,
                align_corners=False,
                loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            ),
            **head,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )


def detector(kind: str = 'RetinaNet', width: int = 4, classes: int = 6, depth: int = 18) -> dict:
    """An mmdet detector, ResNet and FPN of ``width`` channels.

    Args:
        kind: ``RetinaNet``, ``GFL``, ``FCOS``, ``FasterRCNN``, ``MaskRCNN``, ``CascadeRCNN`` or ``CascadeMaskRCNN``.
    """
    backbone = dict(
        type='ResNet',
        depth=depth,
        stem_channels=width,
        base_channels=width,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=NORM,
        norm_eval=False,
        style='pytorch',
    )
    two_stage = kind.endswith('RCNN')
    neck = dict(
        type='FPN',
        in_channels=[width, width * 2, width * 4, width * 8],
        out_channels=4 * width,
        num_outs=5,
        start_level=0 if two_stage else 1,
        **({} if two_stage else dict(add_extra_convs='on_input')),
    )
    model = dict(
        type=kind.replace('CascadeMask', 'Cascade'),
        _scope_='mmdet',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=32, pad_mask=True
        ),
        backbone=backbone,
        neck=neck,
        test_cfg=dict(
            nms_pre=100, min_bbox_size=0, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50
        ),
    )
    head = dict(num_classes=classes, in_channels=4 * width, feat_channels=4 * width, stacked_convs=1)
    delta = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4)
    if kind == 'RetinaNet':
        model['bbox_head'] = dict(
            type='RetinaHead',
            **head,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=2,
                scales_per_octave=1,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16, 32, 64, 128],
            ),
            bbox_coder=delta,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        )
        model['train_cfg'] = dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        )
    elif kind == 'GFL':
        model['bbox_head'] = dict(
            type='GFLHead',
            **head,
            norm_cfg=dict(type='BN'),
            anchor_generator=dict(
                type='AnchorGenerator',
                ratios=[1.0],
                octave_base_scale=4,
                scales_per_octave=1,
                strides=[8, 16, 32, 64, 128],
            ),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
            loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
            reg_max=8,
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        )
        model['train_cfg'] = dict(
            assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False
        )
    elif kind == 'FCOS':
        model['bbox_head'] = dict(
            type='FCOSHead',
            **head,
            norm_cfg=dict(type='BN'),
            strides=[8, 16, 32, 64, 128],
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='IoULoss', loss_weight=1.0),
            loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        )
    elif two_stage:
        rpn_proposal = dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
        model['rpn_head'] = dict(
            type='RPNHead',
            in_channels=4 * width,
            feat_channels=4 * width,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=delta,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        )
        model['roi_head'] = dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
                out_channels=4 * width,
                featmap_strides=[4, 8, 16, 32],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=4 * width,
                fc_out_channels=16,
                roi_feat_size=7,
                num_classes=classes,
                bbox_coder=delta,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            ),
        )
        assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3, ignore_iof_thr=-1)
        sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
        model['train_cfg'] = dict(
            rpn=dict(
                assigner=assigner,
                sampler=dict(sampler, add_gt_as_proposals=False),  # objects are no anchors
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=rpn_proposal,
            rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False),
        )
        model['test_cfg'] = dict(
            rpn=rpn_proposal,
            rcnn=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
        )
        if 'Mask' in kind:
            _add_masks(model, width, classes)
        if 'Cascade' in kind:
            _make_cascade(model)
    return model


def _add_masks(model: dict, width: int, classes: int) -> None:
    model['roi_head'].update(
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=4 * width,
            featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(
            type='FCNMaskHead', num_convs=1, in_channels=4 * width, conv_out_channels=8, num_classes=classes
        ),
    )
    model['train_cfg']['rcnn']['mask_size'] = 14
    model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5


def _make_cascade(model: dict) -> None:
    """Three stages: one box for all classes, ever finer box coders, ever higher thresholds."""
    head, rcnn = model['roi_head'], model['train_cfg']['rcnn']
    head.update(type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, 0.5, 0.25])
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    coders = [dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=s) for s in stds]
    head['bbox_head'] = [dict(head['bbox_head'], reg_class_agnostic=True, bbox_coder=coder) for coder in coders]
    model['train_cfg']['rcnn'] = [
        dict(rcnn, assigner=dict(rcnn['assigner'], pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou))
        for iou in (0.5, 0.6, 0.7)
    ]


def deformable_detr(embed: int = 16, classes: int = 6, queries: int = 10) -> dict:
    """An mmdet ``DeformableDETR`` with one encoder and two decoder layers."""
    layer = dict(
        self_attn_cfg=dict(embed_dims=embed, num_heads=2), ffn_cfg=dict(embed_dims=embed, feedforward_channels=16)
    )
    return dict(
        type='DeformableDETR',
        _scope_='mmdet',
        num_queries=queries,
        num_feature_levels=2,
        with_box_refine=False,
        as_two_stage=False,
        data_preprocessor=dict(type='DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=True, pad_size_divisor=1),
        backbone=dict(
            type='ResNet', depth=18, stem_channels=4, base_channels=4, num_stages=4, out_indices=(2, 3), norm_cfg=NORM
        ),
        neck=dict(
            type='ChannelMapper', in_channels=[16, 32], kernel_size=1, out_channels=embed, norm_cfg=None, num_outs=2
        ),
        encoder=dict(
            num_layers=1,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=embed, num_heads=2, num_levels=2, num_points=2),
                ffn_cfg=layer['ffn_cfg'],
            ),
        ),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            post_norm_cfg=None,
            layer_cfg=dict(
                self_attn_cfg=layer['self_attn_cfg'],
                cross_attn_cfg=dict(embed_dims=embed, num_heads=2, num_levels=2, num_points=2),
                ffn_cfg=layer['ffn_cfg'],
            ),
        ),
        positional_encoding=dict(num_feats=embed // 2, normalize=True, offset=-0.5),
        bbox_head=dict(
            type='DeformableDETRHead',
            num_classes=classes,
            embed_dims=embed,
            sync_cls_avg_factor=True,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
            loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0),
        ),
        train_cfg=dict(
            assigner=dict(
                type='HungarianAssigner',
                match_costs=[
                    dict(type='FocalLossCost', weight=2.0),
                    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                    dict(type='IoUCost', iou_mode='giou', weight=2.0),
                ],
            )
        ),
        test_cfg=dict(max_per_img=10),
    )


def dino(classes: int = 6, queries: int = 10) -> dict:
    """An mmdet ``DINO`` with one encoder and two decoder layers, of the one width that its encoding allows."""
    model = deformable_detr(256, classes, queries)
    model['bbox_head']['type'] = 'DINOHead'
    groups = dict(dynamic=True, num_groups=None, num_dn_queries=8)
    return model | dict(
        type='DINO',
        with_box_refine=True,
        as_two_stage=True,
        dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=groups),
    )


def detr(embed: int = 16, classes: int = 6, queries: int = 10) -> dict:
    """An mmdet ``DETR``: one level, a softmax with background; one encoder and two decoder layers."""
    model = deformable_detr(embed, classes, queries)
    attention = dict(embed_dims=embed, num_heads=2, batch_first=True)
    ffn = dict(embed_dims=embed, feedforward_channels=16)
    for key in ('num_feature_levels', 'with_box_refine', 'as_two_stage'):
        del model[key]
    model['backbone']['out_indices'] = (3,)
    model['neck'].update(in_channels=[32], num_outs=1)
    model['train_cfg']['assigner']['match_costs'][0] = dict(type='ClassificationCost', weight=1.0)
    model['bbox_head'].update(
        type='DETRHead',
        loss_cls=dict(type='CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False, loss_weight=1.0, class_weight=1.0),
    )
    return model | dict(
        type='DETR',
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
        ),
        positional_encoding=dict(num_feats=embed // 2, normalize=True),
    )


def saved(model: dict, path: Path, classes: tuple[str, ...] | None = None, seed: int = 1) -> str:
    """Build ``model``, write its (random) weights as MMEngine would, and return the file."""
    from kd_dense.models.build import build_model

    torch.manual_seed(seed)
    built = build_model(model, 'model')
    built.init_weights()
    meta = {'dataset_meta': {'classes': classes}} if classes else {}
    torch.save({'state_dict': built.state_dict(), 'meta': meta}, path)
    return str(path)


def segmentation_batch(count: int = 2, size: tuple[int, int] = SIZE, classes: int = 7) -> dict:
    """What the data loader gives an mmseg model: raw images and label maps."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(count):
        labels = torch.randint(0, classes, (1, *size))
        labels[:, :4] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=size, ori_shape=size)))
    return dict(
        inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(count)], data_samples=samples
    )


def detection_batch(
    sizes: tuple[tuple[int, int], ...] = (SIZE, (48, 64)), classes: int = 6, boxes: int = 3, masks: bool = False
) -> dict:
    """What the data loader gives an mmdet model: raw images of different sizes, and boxes (and masks within them)."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    samples, images = [], []
    for i, (h, w) in enumerate(sizes):
        corner = torch.rand(boxes, 2) * torch.tensor([w / 2, h / 2])
        instances = InstanceData(
            bboxes=torch.cat([corner, corner + 8 + torch.rand(boxes, 2) * 20], 1),
            labels=torch.randint(0, classes, (boxes,)),
        )
        if masks:
            instances.masks = _ellipses(instances.bboxes, (h, w))
        meta = dict(img_shape=(h, w), ori_shape=(h, w), scale_factor=(1.0, 1.0), img_id=i, pad_shape=(h, w))
        samples.append(DetDataSample(gt_instances=instances, metainfo=meta))
        images.append(torch.randint(0, 256, (3, h, w), dtype=torch.uint8))
    return dict(inputs=images, data_samples=samples)


def _ellipses(boxes: torch.Tensor, size: tuple[int, int]) -> Any:
    """Bitmaps of the ellipses that fill the boxes."""
    from mmdet.structures.mask import BitmapMasks

    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing='ij')
    x1, y1, x2, y2 = (edge[:, None, None] for edge in boxes.unbind(1))
    inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
    return BitmapMasks(inside.numpy().astype('uint8'), *size)


def scenes(folder: Path) -> Path:
    """Eight training and four validation scenes of 64 x 64."""
    return generate(folder, train=8, val=4, size=SIZE, seed=0, progress=False)


def segmentation_run(model: dict, data: Path, iterations: int = 4, interval: int = 2) -> Config:
    """A complete mmseg training config on :func:`scenes`, stopped after ``iterations``."""
    cfg = Config.fromfile('configs/_base_/scenes_segmentation.py')
    cfg.model = model
    for part in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[part].dataset.data_root = str(data)
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=iterations, val_interval=interval)
    cfg.default_hooks.checkpoint.update(interval=interval, max_keep_ckpts=10)
    cfg.default_hooks.logger.interval = 1
    return cfg


def detection_run(model: dict, data: Path, epochs: int = 2) -> Config:
    """A complete mmdet training config on :func:`scenes`, four iterations an epoch."""
    cfg = Config.fromfile('configs/_base_/scenes_detection.py')
    cfg.model = model
    for part in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[part].dataset.data_root = f'{data}/'
    for part in ('val_evaluator', 'test_evaluator'):
        cfg[part].ann_file = f'{data}/annotations/instances_val.json'
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1)
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=10)
    cfg.default_hooks.logger.interval = 1
    return cfg


def transformer(kind: str = 'mit', width: int = 4, classes: int = 7) -> dict:
    """An mmseg ``EncoderDecoder`` with a four-stage transformer (``mit``, ``pvt`` or ``swin``) of one block a stage."""
    common = dict(embed_dims=width, num_heads=[1, 2, 2, 4], out_indices=(0, 1, 2, 3), drop_path_rate=0.1)
    backbone, widths = {
        'mit': (dict(type='MixVisionTransformer', num_layers=[1, 1, 1, 1], mlp_ratio=2), [1, 2, 2, 4]),
        'pvt': (
            dict(type='mmdet.PyramidVisionTransformerV2', num_layers=[1, 1, 1, 1], mlp_ratios=(2, 2, 2, 2)),
            [1, 2, 2, 4],
        ),
        'swin': (dict(type='SwinTransformer', depths=(1, 1, 1, 1), window_size=4, mlp_ratio=2), [1, 2, 4, 8]),
    }[kind]
    model = segmentor(width, classes)
    model['backbone'] = common | backbone
    model['decode_head']['in_channels'] = [width * w for w in widths]
    return model
