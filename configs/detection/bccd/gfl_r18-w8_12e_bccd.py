# The student on BCCD: the teacher with a quarter of its width.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w8_12e_bccd.py
_base_ = ['./gfl_r18-w32_12e_bccd.py']
model = dict(
    backbone=dict(stem_channels=8, base_channels=8),
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16),
)
