# The transformer teacher on CamVid: MiT-B0 from scratch.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
_base_ = ['./r18-w32_400_camvid-240x180.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='MixVisionTransformer',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8],
        sr_ratios=[8, 4, 2, 1],
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[32, 64, 160, 256], channels=96),
)

# Transformers want a smaller rate than the ResNets next door, and more time.
max_iters = 600
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=300)
