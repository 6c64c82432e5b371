# RetinaNet R101 -> R50 on COCO, relations between the objects of a batch.
#
#   mim download mmdet --config retinanet_r101_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/rkd/rkd_retinanet-r101_retinanet-r50_1x_coco.py
#
# MMDetection publishes 38.5 AP for this teacher and 36.5 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
        checkpoint='checkpoints/retinanet_r101_fpn_1x_coco_20200130-7a93545f.pth',
    ),
    distillers=dict(
        # Each ground-truth box is an example, pooled from the level that fits its size: the coarsest, of stride 128, is
        # for none of an image of 800 x 1333. The boxes of both images of a GPU are related to each other. 1 and 2 are
        # the authors' weights of distances and angles in metric learning.
        relations=dict(type='RKD', taps=['neck:0', 'neck:1', 'neck:2', 'neck:3'], mode='roi', distance=1.0, angle=2.0),
    ),
)
