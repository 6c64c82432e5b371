# YOLO11 m -> n on COCO, the loss that Ultralytics ships.
#
#   python tools/train.py configs/yolo/native/native_yolo11-m_yolo11-n_100e_coco.py
#   python tools/test.py configs/yolo/native/native_yolo11-m_yolo11-n_100e_coco.py \
#       work_dirs/native_yolo11-m_yolo11-n_100e_coco/weights/best.pt
#
# Published by Ultralytics for these models without distillation, with its own and longer recipe (mAP50-95 on val2017):
# 39.5 YOLO11n, 51.5 YOLO11m. Distilled, with this schedule: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo11n.yaml'
teacher = dict(checkpoint='checkpoints/yolo11m.pt', config='yolo11m.yaml')
distillers = dict(native=dict(type='Native', loss_weight=6.0))
