# The student of the demo: its teacher with three eighths of the width, trained half as long.
_base_ = ['./segmentation_teacher.py']

model = dict(
    backbone=dict(stem_channels=12, base_channels=12),
    decode_head=dict(in_channels=[12, 24, 48, 96], channels=48),
)

max_iters = 400
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=200))
