# The transformer student on CamVid: a quarter of the teacher's width, and one block in each stage instead of two.
#
#   python tools/train.py configs/segmentation/camvid/mit-w8_600_camvid-240x180.py
_base_ = ['./mit-w32_600_camvid-240x180.py']
model = dict(
    backbone=dict(embed_dims=8, num_layers=[1, 1, 1, 1]),
    decode_head=dict(in_channels=[8, 16, 40, 64], channels=32),
)
