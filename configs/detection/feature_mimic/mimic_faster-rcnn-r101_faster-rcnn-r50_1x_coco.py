# Faster R-CNN R101 -> R50 on COCO, FPN features.
#
#   mim download mmdet --config faster-rcnn_r101_fpn_2x_coco --dest checkpoints
#   python tools/train.py configs/detection/feature_mimic/mimic_faster-rcnn-r101_faster-rcnn-r50_1x_coco.py
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
        # Both necks have 256 channels; a connector all the same, because equal width does not mean equal meaning.
        neck=dict(type='FeatureMimic', taps='neck', connector='Conv1x1', loss_weight=dict(type='auto', share=0.2)),
    ),
)
