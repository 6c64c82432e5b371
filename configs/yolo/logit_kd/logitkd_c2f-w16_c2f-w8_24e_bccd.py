# BCCD on a CPU, class predictions. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/logit_kd/logitkd_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # At the start with as much gradient at the class logits as the task has there.
    logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=1.0)),
)
