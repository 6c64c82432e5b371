# GFL R101 -> R50 on COCO, distributions of the box sides (localisation distillation).
#
#   mim download mmdet --config gfl_r101_fpn_ms-2x_coco --dest checkpoints
#   python tools/train.py configs/detection/localization_kd/localizationkd_gfl-r101_gfl-r50_1x_coco.py
#
# MMDetection publishes 44.7 AP for this teacher, 40.2 for the student alone, and 41.0 for its own LD recipe of this
# pair, which has the main region only. Our distilled score is not measured here.
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
        # As in the authors' code: temperature 10, both regions summed over the places, each times 0.25. With other
        # batches than 2 images per GPU take reduction='mean', whose weight does not depend on them.
        boxes=dict(type='LocalizationKD', taps='boxes', temperature=10.0, reduction='sum', loss_weight=0.25),
    ),
)
