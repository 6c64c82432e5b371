# Mask R-CNN Swin-S -> R50 on COCO, classes, boxes and masks of the student's proposals.
#
#   mim download mmdet --config mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco --dest checkpoints
#   python tools/train.py configs/detection/roi_kd/roikd_mask-rcnn-swin-s_mask-rcnn-r50_1x_coco.py
#
# MMDetection publishes 48.2 box AP and 43.2 mask AP for this teacher, 38.2 and 34.7 for the student alone. The
# distilled score is not measured here.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
        checkpoint='checkpoints/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth',
    ),
    distillers=dict(
        # The method's defaults: means over the 512 regions that the student samples in each image, of which the
        # background weighs 1.5 times as much as an object. Masks are compared on the positive ones.
        rois=dict(type='RoIKD', class_weight=1.0, box_weight=1.0, mask_weight=1.0, background_weight=1.5),
    ),
)
