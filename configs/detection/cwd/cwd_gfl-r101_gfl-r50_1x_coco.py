# GFL R101 -> R50 on COCO, channel-wise divergence of the FPN levels.
#
#   mim download mmdet --config gfl_r101_fpn_ms-2x_coco --dest checkpoints
#   python tools/train.py configs/detection/cwd/cwd_gfl-r101_gfl-r50_1x_coco.py
#   python tools/test.py configs/detection/cwd/cwd_gfl-r101_gfl-r50_1x_coco.py \
#       work_dirs/cwd_gfl-r101_gfl-r50_1x_coco/epoch_12.pth
#
# MMDetection publishes 44.7 AP for this teacher and 40.2 for the student alone; MMRazor publishes 41.9 for its own CWD
# recipe of this pair (on the class maps). Our distilled score is not measured here.
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
        # All five FPN levels, 256 channels on both sides: no connector.
        # 'auto': a tenth of the task gradient at the neck.
        neck=dict(type='CWD', taps='neck', temperature=1.0, loss_weight=dict(type='auto', share=0.1)),
    ),
)
