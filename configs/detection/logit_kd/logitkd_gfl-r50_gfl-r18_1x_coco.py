# GFL R50 -> R18 on COCO, class predictions and FPN features.
#
#   mim download mmdet --config gfl_r50_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/logit_kd/logitkd_gfl-r50_gfl-r18_1x_coco.py
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
        # Each class on its own (GFL's head is a sigmoid), divided by how many objects the teacher expects.
        logits=dict(type='LogitKD', temperature=1.0, loss_weight=dict(type='auto', share=0.1)),
        # Where the maps look, not how strong they are.
        neck=dict(type='NFD', taps=['neck:0', 'neck:1', 'neck:2'], loss_weight=dict(type='auto', share=0.1)),
    ),
)
