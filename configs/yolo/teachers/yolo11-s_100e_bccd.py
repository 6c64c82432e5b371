# YOLO11-s on BCCD, without distillation: the teacher of ../native/native_yolo11-s_yolo11-n_100e_bccd.py.
#
#   python tools/train.py configs/yolo/teachers/yolo11-s_100e_bccd.py
#
# Score: not measured.
_base_ = '../_base_/bccd_100e.py'

student = 'yolo11s.yaml'  # from scratch; 'yolo11s.pt' starts from a file of COCO weights, if you have it
