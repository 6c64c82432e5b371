# RetinaNet X101 -> R50 on COCO, Pearson correlation of the FPN levels.
#
#   mim download mmdet --config retinanet_x101-64x4d_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/pkd/pkd_retinanet-x101_retinanet-r50_2x_coco.py
#
# MMDetection publishes 41.0 AP for this teacher and 37.4 for the student alone; MMRazor publishes 40.8 for its own
# PKD recipe of this pair and schedule. Our distilled score is not measured here.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        checkpoint='checkpoints/retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth',
    ),
    distillers=dict(
        # The four finest levels, each at weight 10.0, as in MMRazor's recipe. Patterns are compared, not magnitudes, so
        # the weight does not depend on the models.
        neck=dict(type='PKD', taps=['neck:0', 'neck:1', 'neck:2', 'neck:3'], loss_weight=10.0),
    ),
)
