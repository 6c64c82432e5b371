# BCCD, neck maps by NFD and class predictions by LogitKD, both fading out. Train the teacher first; the numbers are in
# docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/nfd/nfd-logitkd_c2f-w16_c2f-w8_24e_bccd.py
_base_ = './nfd_c2f-w16_c2f-w8_24e_bccd.py'

# At the start with as much gradient at the neck as the task has there, and a third of it at the class logits; both fall
# to 0 by the end, where the labels alone count.
distillers = dict(
    neck=dict(loss_weight=dict(decay='linear')),
    logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.3, decay='linear')),
)
