# The teacher of the PVTv2 pair on NYUv2: B2, from ImageNet weights.
#
#   python tools/train.py configs/segmentation/teachers/pvtv2-b2_4xb4-40k_nyuv2-480x640.py
_base_ = ['../students/pvtv2-b0-scratch_4xb4-40k_nyuv2-480x640.py']
model = dict(
    backbone=dict(
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)
