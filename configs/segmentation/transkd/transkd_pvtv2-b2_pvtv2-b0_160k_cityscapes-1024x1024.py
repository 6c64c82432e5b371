# PVTv2 B2 -> B0 on Cityscapes: TransKD.
#
#   python tools/train.py configs/segmentation/teachers/pvtv2-b2_8xb1-160k_cityscapes-1024x1024.py
#   python tools/train.py configs/segmentation/transkd/transkd_pvtv2-b2_pvtv2-b0_160k_cityscapes-1024x1024.py
#
# The variants GL-Mixer and embedding assistant: --cfg-options model.distillers.transkd.variant=gl (or ea), with a
# --work-dir of their own.
#
# There is no published score for this recipe, and ours is not measured.
_base_ = ['../students/pvtv2-b0-scratch_8xb1-160k_cityscapes-1024x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/teachers/pvtv2-b2_8xb1-160k_cityscapes-1024x1024.py',
        checkpoint='work_dirs/pvtv2-b2_8xb1-160k_cityscapes-1024x1024/iter_160000.pth',
    ),
    distillers=dict(
        transkd=dict(type='TransKD', variant='base'),
    ),
)
