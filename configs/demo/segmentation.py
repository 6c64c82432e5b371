# python tools/compare.py configs/demo/segmentation.py --seeds 0 --work-dir work_dirs/demo_segmentation
# (make demo generates the data and trains the teacher first)
# The student is the teacher with a quarter of its width.
_base_ = ['./segmentation_teacher.py', '../_base_/runtime.py']
custom_imports = dict(imports=['kd_dense', 'kd_dense.data.datasets'], allow_failed_imports=False)

student = {{_base_.model}}
student.backbone.update(stem_channels=8, base_channels=8)
student.decode_head.update(in_channels=[8, 16, 32, 64], channels=32)

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student=student,
    teacher=dict(config='configs/demo/segmentation_teacher.py', checkpoint='work_dirs/demo_segmentation/teacher/iter_1200.pth'),
    distillers=dict(
        # Softened class predictions at every pixel: the teacher's doubts about which classes look alike.
        logits=dict(type='LogitKD', temperature=2.0, loss_weight=2.0),
    ),
)

max_iters = 600
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200))
