# The student of the demo: its teacher with a quarter of the width, trained half as long.
_base_ = ['./segmentation_teacher.py']

model = dict(
    backbone=dict(stem_channels=8, base_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=32),
)

max_iters = 600
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200))
