# Few labels: a teacher that saw all of BCCD, a student that has a quarter of it. The loss that Ultralytics ships.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_48e_bccd.py
#   python tools/train.py configs/yolo/native/native_c2f-w16_c2f-w8_96e_bccd-quarter.py
_base_ = '../_base_/bccd-quarter_96e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_48e_bccd/weights/last.pt')
distillers = dict(
    # The weight is Ultralytics' own default (its dis=6).
    native=dict(type='Native', loss_weight=6.0),
)
