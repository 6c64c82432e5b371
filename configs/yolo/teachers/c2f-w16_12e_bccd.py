# The teacher of the short runs on BCCD.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_12e_bccd.py
_base_ = '../_base_/bccd_12e.py'

student = 'configs/demo/yolo_teacher.yaml'
