# The student on CamVid: the teacher with a quarter of its width.
#
#   python tools/train.py configs/segmentation/camvid/r18-w8_400_camvid-240x180.py
_base_ = ['./r18-w32_400_camvid-240x180.py']
model = dict(
    backbone=dict(stem_channels=8, base_channels=8),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=32),
)
