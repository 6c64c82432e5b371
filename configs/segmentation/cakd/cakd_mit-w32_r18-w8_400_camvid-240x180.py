# CamVid on a CPU, a transformer teaches a CNN: cross-architecture distillation. Train the teacher first.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/cakd/cakd_mit-w32_r18-w8_400_camvid-240x180.py
#   python tools/test.py configs/segmentation/cakd/cakd_mit-w32_r18-w8_400_camvid-240x180.py \
#       work_dirs/cakd_mit-w32_r18-w8_400_camvid-240x180/iter_400.pth
#
# The numbers are in docs/results.md.
_base_ = ['../camvid/r18-w8_400_camvid-240x180.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]
model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/camvid/mit-w32_600_camvid-240x180.py',
        checkpoint='work_dirs/mit-w32_600_camvid-240x180/iter_600.pth',
    ),
    distillers=dict(
        cakd=dict(
            type='CAKD',
            # the last block of the last stage: 5 x 7 tokens that all attend to all
            attention='backbone.layers.3.1.1.attn.attn',
            taps='backbone:3',
            # A patch of 32 pixels would be a seventh of the width of these images.
            views=dict(patch=16),
            # The weight of the paper; the sum of the terms is of the size of the cross entropy here.
            loss_weight=1.0,
        ),
    ),
)
