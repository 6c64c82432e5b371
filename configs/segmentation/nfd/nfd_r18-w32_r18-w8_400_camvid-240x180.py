# CamVid on a CPU, normalised feature distillation. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/segmentation/camvid/r18-w32_400_camvid-240x180.py
#   python tools/train.py configs/segmentation/nfd/nfd_r18-w32_r18-w8_400_camvid-240x180.py
#   python tools/test.py configs/segmentation/nfd/nfd_r18-w32_r18-w8_400_camvid-240x180.py \
#       work_dirs/nfd_r18-w32_r18-w8_400_camvid-240x180/iter_400.pth
_base_ = ['../camvid/r18-w8_400_camvid-240x180.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]
model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/camvid/r18-w32_400_camvid-240x180.py',
        checkpoint='work_dirs/r18-w32_400_camvid-240x180/iter_400.pth',
    ),
    distillers=dict(
        # The joined features before the classifier; the students here end long before they converge, and a feature
        # hint helps them sooner than softened predictions do.
        head=dict(type='NFD', taps='decode_head.fusion_conv', loss_weight=2.0),
    ),
)
