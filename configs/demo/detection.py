# python tools/compare.py configs/demo/detection.py --seeds 0 --work-dir work_dirs/demo_detection
# (make demo TASK=detection generates the data and trains the teacher first)
_base_ = ['./detection_student.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(config='configs/demo/detection_teacher.py', checkpoint='work_dirs/demo_detection/teacher/epoch_9.pth'),
    distillers=dict(
        # Class predictions at every anchor, and the pattern of every pyramid level. 'auto': each is given three
        # tenths of the task's gradient. With a fixed weight of 1 the pattern of three levels drowns the task.
        logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.3)),
        neck=dict(type='NFD', taps='neck', loss_weight=dict(type='auto', share=0.3)),
    ),
)
