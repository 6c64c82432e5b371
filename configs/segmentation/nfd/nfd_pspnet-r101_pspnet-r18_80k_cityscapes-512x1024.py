# PSPNet R101 -> R18 on Cityscapes, normalised feature distillation of the last backbone stage.
#
#   mim download mmsegmentation --config pspnet_r101-d8_4xb2-80k_cityscapes-512x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/nfd/nfd_pspnet-r101_pspnet-r18_80k_cityscapes-512x1024.py
#
# MMSegmentation publishes 79.76 mIoU for this teacher and 74.87 for the student alone. The distilled score is not
# measured here.
_base_ = ['mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        checkpoint='checkpoints/pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth',
    ),
    distillers=dict(
        # backbone:3 is the map behind layer4: 512 channels of the student, 2048 of the teacher, both at stride 8.
        # The loss starts near 2 whatever the models, so the weight needs little tuning; 1 to 10 is a sensible range.
        nfd=dict(type='NFD', taps='backbone:3', loss_weight=3.0),
    ),
)
