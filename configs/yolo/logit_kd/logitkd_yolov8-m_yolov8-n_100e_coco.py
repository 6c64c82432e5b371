# YOLOv8 m -> n on COCO, class predictions at every cell.
#
#   python tools/train.py configs/yolo/logit_kd/logitkd_yolov8-m_yolov8-n_100e_coco.py
#   python tools/test.py configs/yolo/logit_kd/logitkd_yolov8-m_yolov8-n_100e_coco.py \
#       work_dirs/logitkd_yolov8-m_yolov8-n_100e_coco/weights/best.pt
#
# Published by Ultralytics without distillation, longer recipe: 37.3 YOLOv8n, 50.2 YOLOv8m. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolov8n.yaml'
# Class predictions are compared class by class, so student and teacher need the same class names in the same order.
teacher = dict(checkpoint='checkpoints/yolov8m.pt', config='yolov8m.yaml')
distillers = dict(
    # Above 1 the temperature brings out what the teacher thinks of the classes that it does not choose.
    logits=dict(type='LogitKD', temperature=2.0, loss_weight=dict(type='auto', share=0.1)),
)
