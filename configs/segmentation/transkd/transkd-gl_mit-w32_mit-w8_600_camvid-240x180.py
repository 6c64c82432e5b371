# CamVid on a CPU, transformers: TransKD-GL, GL-Mixer on the patch embedding of the last stage.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/transkd/transkd-gl_mit-w32_mit-w8_600_camvid-240x180.py
#
# The numbers are in docs/results.md.
_base_ = ['./transkd_mit-w32_mit-w8_600_camvid-240x180.py']
model = dict(distillers=dict(transkd=dict(variant='gl')))
