# python tools/compare.py configs/demo/segmentation.py --seeds 0 --work-dir work_dirs/demo_segmentation
# (make demo generates the data and trains the teacher first)
_base_ = ['./segmentation_student.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/demo/segmentation_teacher.py', checkpoint='work_dirs/demo_segmentation/teacher/iter_800.pth'
    ),
    distillers=dict(
        # The pattern of the joined features before the classifier.
        head=dict(type='NFD', taps='decode_head.fusion_conv', loss_weight=2.0),
    ),
)
