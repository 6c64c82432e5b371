# CamVid on a CPU, transformers: TransKD. Train the teacher first.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py --student-alone \
#       --work-dir work_dirs/mit-w8_alone
#   python tools/test.py configs/segmentation/transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py \
#       work_dirs/transkd_mit-w32_mit-w8_600_camvid-240x180/iter_600.pth
#
# The numbers are in docs/results.md.
_base_ = ['../camvid/mit-w8_600_camvid-240x180.py']

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
        # Stage maps after a top-down chain (loss weight 1) and patch embeddings (0.1, 0.1, 0.5 and 1 from the first
        # stage to the last); embedding_weights, feature_weight and levels change that.
        transkd=dict(type='TransKD', variant='base'),
    ),
)
