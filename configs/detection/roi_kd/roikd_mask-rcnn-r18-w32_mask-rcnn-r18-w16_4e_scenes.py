# Instance segmentation of scenes on a CPU: classes, boxes and masks of the regions. Numbers: docs/results.md.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/train.py configs/detection/scenes/mask-rcnn_r18-w32_8e_scenes.py
#   python tools/train.py configs/detection/roi_kd/roikd_mask-rcnn-r18-w32_mask-rcnn-r18-w16_4e_scenes.py
_base_ = ['../scenes/mask-rcnn_r18-w16_4e_scenes.py']

custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=True)]
model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/detection/scenes/mask-rcnn_r18-w32_8e_scenes.py',
        checkpoint='work_dirs/mask-rcnn_r18-w32_8e_scenes/epoch_8.pth',
    ),
    distillers=dict(
        # Each term a mean over regions, as the losses of the student's own heads are.
        regions=dict(type='RoIKD', mask_weight=1.0),
    ),
)
