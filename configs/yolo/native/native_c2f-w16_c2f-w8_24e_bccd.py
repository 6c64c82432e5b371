# BCCD on a CPU, the loss that Ultralytics ships. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/native/native_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # The weight is Ultralytics' own default (its dis=6).
    native=dict(type='Native', loss_weight=6.0),
)
