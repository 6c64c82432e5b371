# Faster R-CNN R101 -> R50 on COCO, dynamic prior knowledge on the FPN levels.
#
#   mim download mmdet --config faster-rcnn_r101_fpn_2x_coco --dest checkpoints
#   python tools/train.py configs/detection/dpk/dpk_faster-rcnn-r101_faster-rcnn-r50_1x_coco.py
#
# MMDetection publishes 39.8 AP for this teacher and 37.4 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        checkpoint='checkpoints/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',
    ),
    distillers=dict(
        # Strides 8, 16 and 32: tokens of 32 x 32 pixels, about a thousand of an image on each. How many of them are the
        # teacher's follows how far the two models are apart. Means of squares of normalised features; the paper's
        # weight is not known, and 'auto' starts at a fifth of the task gradient at these levels.
        prior=dict(type='DPK', taps=['neck:1', 'neck:2', 'neck:3'], loss_weight=dict(type='auto', share=0.2)),
    ),
)
