# BCCD on a CPU, box distributions. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/localization_kd/localizationkd_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # At the start with as much gradient at the box distributions as the task has there.
    boxes=dict(type='LocalizationKD', loss_weight=dict(type='auto', share=1.0)),
)
