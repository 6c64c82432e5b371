# ATSS R101 -> R50 on COCO, masked generation of the FPN levels.
#
#   mim download mmdet --config atss_r101_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/mgd/mgd_atss-r101_atss-r50_1x_coco.py
#
# MMDetection publishes 41.5 AP for this teacher and 39.4 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::atss/atss_r101_fpn_1x_coco.py',
        checkpoint='checkpoints/atss_r101_fpn_1x_20200825-dfcadd6f.pth',
    ),
    distillers=dict(
        # The authors' values for RetinaNet, which has the same FPN; they have none for ATSS.
        mgd=dict(type='MGD', taps='neck', mask_ratio=0.65, reduction='sum', loss_weight=2e-5),
    ),
)

# As the authors train: the sums are large in the first iterations.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
