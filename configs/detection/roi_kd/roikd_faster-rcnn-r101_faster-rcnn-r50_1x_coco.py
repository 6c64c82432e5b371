# Faster R-CNN R101 -> R50 on COCO, classes and boxes of the student's proposals.
#
#   mim download mmdet --config faster-rcnn_r101_fpn_2x_coco --dest checkpoints
#   python tools/train.py configs/detection/roi_kd/roikd_faster-rcnn-r101_faster-rcnn-r50_1x_coco.py
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
        # The method's defaults: means over the 512 regions that the student samples in each image, of which the
        # background weighs 1.5 times as much as an object.
        rois=dict(type='RoIKD', class_weight=1.0, box_weight=1.0, background_weight=1.5),
    ),
)
