# BCCD on a CPU, normalised features. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/nfd/nfd_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # At the start with as much gradient at the levels that feed the head as the task has there.
    neck=dict(type='NFD', taps='neck', loss_weight=dict(type='auto', share=1.0)),
)
