"""Segmentors and detectors of the toolboxes with transformer backbones, small enough for a test."""

from __future__ import annotations

from typing import Any

from tests.helpers import tiny

WIDTHS = [4, 8, 16, 32]
#: Kind of backbone -> the path of an attention module in its last stage, and the tap of that stage's map.
ATTENTION = {
    'mit': 'backbone.layers.3.1.0.attn.attn',
    'swin': 'backbone.stages.3.blocks.0.attn.w_msa',
    'vit': 'backbone.layers.1.attn.attn',
}


def backbone(kind: str) -> dict[str, Any]:
    """``'mit'``, ``'swin'`` (windows of 3) or ``'vit'`` (one map of stride 16, with a class token)."""
    if kind == 'mit':
        return dict(
            type='MixVisionTransformer',
            embed_dims=4,
            num_layers=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            sr_ratios=[8, 4, 2, 1],
            out_indices=(0, 1, 2, 3),
            drop_path_rate=0.1,
        )
    if kind == 'swin':
        return dict(
            type='SwinTransformer',
            embed_dims=4,
            depths=(1, 1, 1, 2),
            num_heads=(1, 2, 2, 4),
            window_size=3,
            out_indices=(0, 1, 2, 3),
        )
    return dict(
        type='VisionTransformer',
        img_size=tiny.SIZE,
        patch_size=16,
        embed_dims=32,
        num_layers=2,
        num_heads=4,
        out_indices=(1,),
        with_cls_token=True,
    )


def segmentor(kind: str, classes: int = 7) -> dict[str, Any]:
    """:func:`tests.helpers.tiny.segmentor` with a transformer for a backbone."""
    head = dict(in_channels=[32], in_index=[0]) if kind == 'vit' else dict(in_channels=WIDTHS)
    model = tiny.segmentor(4, classes, **head)
    model['backbone'] = backbone(kind)
    return model


def detector(kind: str = 'RetinaNet', classes: int = 6) -> dict[str, Any]:
    """:func:`tests.helpers.tiny.detector` with a Swin transformer for a backbone."""
    model = tiny.detector(kind, 4, classes)
    model['backbone'] = {**backbone('swin'), 'mlp_ratio': 4}
    return model
