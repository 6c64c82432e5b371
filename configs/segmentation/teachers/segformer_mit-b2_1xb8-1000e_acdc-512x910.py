# The teacher by the recipe of TransKD's authors on ACDC: B2, from ImageNet weights, batches of 8. They report 69.34
# mIoU.
#
#   python tools/train.py configs/segmentation/teachers/segformer_mit-b2_1xb8-1000e_acdc-512x910.py
_base_ = ['../students/segformer_mit-b0-scratch_1xb2-1000e_acdc-512x910.py']
train_dataloader = dict(batch_size=8)
model = dict(
    backbone=dict(
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/'
            'mit_b2_20220624-66e8bf70.pth',
        ),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)
