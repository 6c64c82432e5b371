# CamVid on a CPU, class predictions. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/segmentation/camvid/r18-w32_400_camvid-240x180.py
#   python tools/train.py configs/segmentation/logit_kd/logitkd_r18-w32_r18-w8_400_camvid-240x180.py
#   python tools/test.py configs/segmentation/logit_kd/logitkd_r18-w32_r18-w8_400_camvid-240x180.py \
#       work_dirs/logitkd_r18-w32_r18-w8_400_camvid-240x180/iter_400.pth
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
        # At temperature 2 the loss is of the size of the cross entropy; more weight follows the teacher more closely.
        logits=dict(type='LogitKD', temperature=2.0, loss_weight=1.0),
    ),
)
