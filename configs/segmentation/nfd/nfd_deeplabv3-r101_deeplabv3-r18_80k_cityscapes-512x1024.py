# DeepLabV3 R101 -> R18 on Cityscapes, normalised feature distillation of the last backbone stage.
#
#   mim download mmsegmentation --config deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/nfd/nfd_deeplabv3-r101_deeplabv3-r18_80k_cityscapes-512x1024.py
#
# MMSegmentation publishes 80.2 mIoU for this teacher and 76.7 for the student alone. The distilled score is not
# measured here.
_base_ = ['mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        checkpoint='checkpoints/deeplabv3_r101-d8_512x1024_80k_cityscapes_20200606_113503-9e428899.pth',
    ),
    distillers=dict(
        # 512 channels of the student against 2048 of the teacher, both at stride 8. The loss starts near 2 whatever the
        # models; 1 to 10 is a sensible range of weights.
        nfd=dict(type='NFD', taps='backbone:3', loss_weight=3.0),
    ),
)
