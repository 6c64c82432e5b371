# YOLO26 s -> n on COCO, plain feature imitation.
#
#   python tools/train.py configs/yolo/feature_mimic/mimic_yolo26-s_yolo26-n_100e_coco.py
#   python tools/test.py configs/yolo/feature_mimic/mimic_yolo26-s_yolo26-n_100e_coco.py \
#       work_dirs/mimic_yolo26-s_yolo26-n_100e_coco/weights/best.pt
#
# Published by Ultralytics without distillation, longer recipe: 40.9 YOLO26n, 48.6 YOLO26s. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo26n.yaml'
teacher = dict(checkpoint='checkpoints/yolo26s.pt', config='yolo26s.yaml')
distillers = dict(
    # The three backbone stages that the neck reads (strides 8, 16, 32); the teacher stops there, its neck and head do
    # not run. One 1x1 convolution per level where the widths differ. Every cell counts alike, background included. The
    # weight falls smoothly to 0 at 90 % of the training: the student ends on its own loss alone.
    backbone=dict(
        type='FeatureMimic',
        taps='backbone',
        loss_weight=dict(type='auto', share=0.1, warmup=0.02, decay='cosine', stop=0.9),
    ),
)
