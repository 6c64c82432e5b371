# RTMDet l -> s on COCO, Pearson correlation of the three levels of the neck.
#
#   mim download mmdet --config rtmdet_l_8xb32-300e_coco --dest checkpoints
#   python tools/train.py configs/detection/pkd/pkd_rtmdet-l_rtmdet-s_300e_coco.py
#
# MMDetection publishes 51.3 AP for this teacher and 44.5 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py']
custom_imports = dict(imports=['kd_dense'], allow_failed_imports=False)
# The stock config's own hooks stay: moving average, and another pipeline for the last 20 epochs.
custom_hooks = [*_base_.custom_hooks, dict(type='kd_dense.DistillationHook')]

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        checkpoint='checkpoints/rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth',
    ),
    distillers=dict(
        # 256 channels of the teacher, 128 of the student: a 1x1 convolution for each level. The weight is that of dense
        # heads in MMRazor's recipes; none is for this pair.
        neck=dict(type='PKD', taps='neck', loss_weight=10.0),
    ),
)
