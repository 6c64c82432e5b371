# PVTv2-B0, from random weights, in the place of SegFormer-B0 on Cityscapes.
_base_ = ['./segformer_mit-b0-scratch_8xb1-160k_cityscapes-1024x1024.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.1,
    )
)
