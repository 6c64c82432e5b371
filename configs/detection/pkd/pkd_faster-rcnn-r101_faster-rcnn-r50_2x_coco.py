# Faster R-CNN R101 -> R50 on COCO, Pearson correlation of the FPN levels.
#
#   mim download mmdet --config faster-rcnn_r101_fpn_2x_coco --dest checkpoints
#   python tools/train.py configs/detection/pkd/pkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco.py
#
# MMDetection publishes 39.8 AP for this teacher and 38.4 for the student alone; MMRazor publishes 40.4 for its own
# PKD recipe of this pair and schedule. Our distilled score is not measured here.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        checkpoint='checkpoints/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',
    ),
    distillers=dict(
        # The four finest levels, each at weight 6.0, as in MMRazor's recipe. Patterns are compared, not magnitudes, so
        # the weight does not depend on the models.
        neck=dict(type='PKD', taps=['neck:0', 'neck:1', 'neck:2', 'neck:3'], loss_weight=6.0),
    ),
)
