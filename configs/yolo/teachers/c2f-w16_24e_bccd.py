# The teacher of the short runs on BCCD.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

student = 'configs/demo/yolo_teacher.yaml'
