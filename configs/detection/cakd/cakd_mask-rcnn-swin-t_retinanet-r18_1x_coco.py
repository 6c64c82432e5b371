# Mask R-CNN Swin-T -> RetinaNet R18 on COCO, cross-architecture distillation of the last backbone stage. The heads take
# no part in it, so they may differ.
#
#   mim download mmdet --config mask-rcnn_swin-t-p4-w7_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/cakd/cakd_mask-rcnn-swin-t_retinanet-r18_1x_coco.py
#
# MMDetection publishes 42.7 AP for this teacher and 31.7 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        checkpoint='checkpoints/mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth',
    ),
    distillers=dict(
        cakd=dict(
            type='CAKD',
            attention='backbone.stages.3.blocks.0.attn.w_msa',
            taps='backbone:3',
            # Images of many sizes: 4 x 4 linear layers, each for a sixteenth of whatever map there is.
            linear=dict(mode='grid', dropout=0.1),
            loss_weight=dict(type='auto', share=0.5, start=0.21, warmup=0.08),
        ),
    ),
)
