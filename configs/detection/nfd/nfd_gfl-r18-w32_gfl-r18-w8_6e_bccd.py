# BCCD on a CPU, normalised features of the neck. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/nfd/nfd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py
_base_ = ['../bccd/gfl_r18-w8_6e_bccd.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]
model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/detection/bccd/gfl_r18-w32_12e_bccd.py',
        checkpoint='work_dirs/gfl_r18-w32_12e_bccd/epoch_12.pth',
    ),
    distillers=dict(
        # At the start with as much gradient at the pyramid as the task has there; as for all methods on these data.
        neck=dict(type='NFD', taps='neck', loss_weight=dict(type='auto', share=1.0)),
    ),
)
