# The teacher of the detection demo: GFL on a ResNet-18 of half the usual width, trained longer than the students.
_base_ = ['../_base_/gfl_r18-w32.py', '../_base_/scenes_detection.py']

# Strides 4, 8, 16: the scenes are 128 pixels wide and most objects are smaller than 32.
model = dict(
    backbone=dict(out_indices=(0, 1, 2)),
    neck=dict(in_channels=[32, 64, 128]),
    bbox_head=dict(num_classes=6, anchor_generator=dict(strides=[4, 8, 16])),
    test_cfg=dict(max_per_img=50),
)

max_epochs = 9
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3))
