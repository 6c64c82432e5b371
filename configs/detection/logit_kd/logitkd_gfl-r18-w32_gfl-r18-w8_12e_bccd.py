# BCCD on a CPU, class predictions and FPN patterns. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/logit_kd/logitkd_gfl-r18-w32_gfl-r18-w8_12e_bccd.py
#   python tools/test.py configs/detection/logit_kd/logitkd_gfl-r18-w32_gfl-r18-w8_12e_bccd.py \
#       work_dirs/logitkd_gfl-r18-w32_gfl-r18-w8_12e_bccd/epoch_12.pth
_base_ = ['../bccd/gfl_r18-w8_12e_bccd.py']

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
        # Each class on its own, divided by how many cells the teacher expects.
        logits=dict(type='LogitKD', temperature=1.0, loss_weight=1.0),
        # Where the pyramid levels respond, not how strongly.
        neck=dict(type='NFD', taps='neck', loss_weight=1.0),
    ),
)
