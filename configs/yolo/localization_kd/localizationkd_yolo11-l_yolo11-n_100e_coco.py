# YOLO11 l -> n on COCO, distributions of the box sides (localisation distillation).
#
#   python tools/train.py configs/yolo/localization_kd/localizationkd_yolo11-l_yolo11-n_100e_coco.py
#   python tools/test.py configs/yolo/localization_kd/localizationkd_yolo11-l_yolo11-n_100e_coco.py \
#       work_dirs/localizationkd_yolo11-l_yolo11-n_100e_coco/weights/best.pt
#
# Published by Ultralytics without distillation, longer recipe: 39.5 YOLO11n, 53.4 YOLO11l. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo11n.yaml'
# Both predict 16 bins for each side of a box, at the same cells.
teacher = dict(checkpoint='checkpoints/yolo11l.pt', config='yolo11l.yaml')
distillers = dict(
    # Temperature 10 as in the paper: it brings out how sure the teacher is of an edge, not only where it is. Means over
    # the places, because the authors' sums would be multiplied by the batch size once more here.
    # 'auto': calibrated in the first step to a tenth of the gradient that the detection loss has on the box branches.
    boxes=dict(type='LocalizationKD', taps='boxes', temperature=10.0, loss_weight=dict(type='auto', share=0.1)),
)
