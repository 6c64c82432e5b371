# Few labels: a teacher that saw all of BCCD, a student that has a quarter of it. Features, classes and boxes together.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_48e_bccd.py
#   python tools/train.py configs/yolo/nfd/nfd-logitkd-localizationkd_c2f-w16_c2f-w8_96e_bccd-quarter.py
_base_ = '../_base_/bccd-quarter_96e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_48e_bccd/weights/last.pt')
# Each at the start with as much gradient at its taps as the task has there. To leave one out, as in docs/results.md:
# --cfg-options distillers.boxes.loss_weight=0
distillers = dict(
    neck=dict(type='NFD', taps='neck', loss_weight=dict(type='auto', share=1.0)),
    logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=1.0)),
    boxes=dict(type='LocalizationKD', loss_weight=dict(type='auto', share=1.0)),
)
