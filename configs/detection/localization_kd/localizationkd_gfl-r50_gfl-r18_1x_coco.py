# GFL R50 -> R18 on COCO, distributions of the box sides (localisation distillation).
#
#   mim download mmdet --config gfl_r50_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/localization_kd/localizationkd_gfl-r50_gfl-r18_1x_coco.py
#
# MMDetection publishes 40.2 AP for this teacher, and 35.8 for GFL R18 alone (in its LD table). The distilled score is
# not measured here.
_base_ = ['../students/gfl_r18_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::gfl/gfl_r50_fpn_1x_coco.py',
        checkpoint='checkpoints/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth',
    ),
    distillers=dict(
        # As in the authors' code: temperature 10, both regions summed over the places, each times 0.25. With other
        # batches than 2 images per GPU take reduction='mean', whose weight does not depend on them.
        boxes=dict(type='LocalizationKD', taps='boxes', temperature=10.0, reduction='sum', loss_weight=0.25),
    ),
)
