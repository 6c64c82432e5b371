# DINO R50 of MMDetection -> YOLO11 n on COCO, features of the necks.
#
#   mim download mmdet --config dino-4scale_r50_8xb2-12e_coco --dest checkpoints
#   python tools/train.py configs/yolo/feature_mimic/mimic_dino-r50_yolo11-n_100e_coco.py
#   python tools/test.py configs/yolo/feature_mimic/mimic_dino-r50_yolo11-n_100e_coco.py \
#       work_dirs/mimic_dino-r50_yolo11-n_100e_coco/weights/best.pt
#
# MMDetection publishes 49.0 AP for this teacher. Published by Ultralytics without distillation, longer recipe: 39.5
# YOLO11n. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo11n.yaml'
teacher = dict(
    config='mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    checkpoint='checkpoints/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth',
    classes='ignore',  # features only: the class lists need not agree
)
distillers = dict(
    # DINO's backbone and neck run, not its transformer; of its strides, 8 to 64, the student's are taken: 8 to 32.
    neck=dict(type='FeatureMimic', taps='neck', loss_weight=dict(type='auto', share=0.1)),
)
