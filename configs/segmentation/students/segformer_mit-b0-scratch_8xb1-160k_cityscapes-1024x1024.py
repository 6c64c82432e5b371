# SegFormer-B0 on Cityscapes as MMSegmentation trains it, but from random weights instead of ImageNet's: TransKD teaches
# students without pre-training.
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py']
model = dict(backbone=dict(init_cfg=None))
