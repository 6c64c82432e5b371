# YOLO26 m -> n on COCO, boxes at the places where localisation is learned.
#
#   python tools/train.py configs/yolo/localization_kd/localizationkd_yolo26-m_yolo26-n_100e_coco.py
#   python tools/test.py configs/yolo/localization_kd/localizationkd_yolo26-m_yolo26-n_100e_coco.py \
#       work_dirs/localizationkd_yolo26-m_yolo26-n_100e_coco/weights/best.pt
#
# Published by Ultralytics without distillation, longer recipe: 40.9 YOLO26n, 53.1 YOLO26m. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo26n.yaml'
teacher = dict(checkpoint='checkpoints/yolo26m.pt', config='yolo26m.yaml')
distillers = dict(
    # YOLO26 predicts the four sides themselves, no distributions: 1 - GIoU of the boxes. The branch that the student is
    # deployed with, one-to-one, is taught by the teacher's one-to-one branch.
    # 'auto': calibrated in the first step to a tenth of the gradient that the detection loss has on these branches.
    boxes=dict(type='LocalizationKD', taps='boxes', form='iou', loss_weight=dict(type='auto', share=0.1)),
    deployed=dict(
        type='LocalizationKD',
        taps='boxes_one2one',
        score_taps='logits_one2one',
        form='iou',
        loss_weight=dict(type='auto', share=0.1),
    ),
)
