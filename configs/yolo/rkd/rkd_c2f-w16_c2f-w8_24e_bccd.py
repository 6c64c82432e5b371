# BCCD on a CPU, relations between the objects. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/rkd/rkd_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # The level of stride 8: levels of different widths, as YOLO's are, can not be related to each other.
    objects=dict(type='RKD', taps='neck:1', loss_weight=dict(type='auto', share=1.0)),
)
