# The student on BCCD with half the epochs of its teacher, for comparisons of many methods.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w8_6e_bccd.py
_base_ = ['./gfl_r18-w8_12e_bccd.py']

max_epochs = 6
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
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3))
