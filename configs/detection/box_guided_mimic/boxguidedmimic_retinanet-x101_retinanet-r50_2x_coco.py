# RetinaNet X101 -> R50 on COCO, focal and global distillation of the FPN levels (FGD).
#
#   mim download mmdet --config retinanet_x101-64x4d_fpn_1x_coco --dest checkpoints
#   python tools/train.py configs/detection/box_guided_mimic/boxguidedmimic_retinanet-x101_retinanet-r50_2x_coco.py
#
# MMDetection publishes 41.0 AP for this teacher and 37.4 for the student alone. FGD's authors publish 40.7 for this
# pair and schedule, with a student whose neck and head start from the teacher's weights, which this one's do not. The
# distilled score is not measured here.
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
        # The authors' weights for RetinaNet. They belong to sums over 256 channels and all cells of images of this
        # size: with other images or widths take loss_weight='auto' instead, which keeps the proportions of the terms.
        fgd=dict(
            type='BoxGuidedMimic',
            taps='neck',
            temperature=0.5,
            terms=dict(foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6),
            loss_weight=1.0,
        ),
    ),
)

# As the authors train: the sums are large in the first iterations.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
