# GFL R101 -> R50 on COCO, Pearson correlation of the FPN levels.
#
#   mim download mmdet --config gfl_r101_fpn_ms-2x_coco --dest checkpoints
#   python tools/train.py configs/detection/pkd/pkd_gfl-r101_gfl-r50_1x_coco.py
#
# MMDetection publishes 44.7 AP for this teacher and 40.2 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
        checkpoint='checkpoints/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',
    ),
    distillers=dict(
        # The four finest levels. MMRazor's recipes have 10 for dense heads and 6 for two-stage ones; none is for this
        # pair.
        neck=dict(type='PKD', taps=['neck:0', 'neck:1', 'neck:2', 'neck:3'], loss_weight=10.0),
    ),
)
