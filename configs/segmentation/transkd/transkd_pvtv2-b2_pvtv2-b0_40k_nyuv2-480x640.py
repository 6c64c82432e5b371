# PVTv2 B2 -> B0 on NYUv2: TransKD.
#
#   python tools/train.py configs/segmentation/teachers/pvtv2-b2_4xb4-40k_nyuv2-480x640.py
#   python tools/train.py configs/segmentation/transkd/transkd_pvtv2-b2_pvtv2-b0_40k_nyuv2-480x640.py
#
# The variants GL-Mixer and embedding assistant: --cfg-options model.distillers.transkd.variant=gl (or ea), with a
# --work-dir of their own.
#
# There is no published score for this recipe, and ours is not measured.
_base_ = ['../students/pvtv2-b0-scratch_4xb4-40k_nyuv2-480x640.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/teachers/pvtv2-b2_4xb4-40k_nyuv2-480x640.py',
        checkpoint='work_dirs/pvtv2-b2_4xb4-40k_nyuv2-480x640/iter_40000.pth',
    ),
    distillers=dict(
        transkd=dict(type='TransKD', variant='base'),
    ),
)
