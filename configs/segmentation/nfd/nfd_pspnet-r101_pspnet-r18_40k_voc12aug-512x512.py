# PSPNet R101 -> R18 on VOC 2012 aug, normalised feature distillation of the last backbone stage.
#
#   mim download mmsegmentation --config pspnet_r101-d8_4xb4-40k_voc12aug-512x512 --dest checkpoints
#   python tools/train.py configs/segmentation/nfd/nfd_pspnet-r101_pspnet-r18_40k_voc12aug-512x512.py
#
# MMSegmentation publishes 78.52 mIoU for this teacher, and no score for the student. The distilled score is not
# measured here.
_base_ = ['../students/pspnet_r18-d8_4xb4-40k_voc12aug-512x512.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::pspnet/pspnet_r101-d8_4xb4-40k_voc12aug-512x512.py',
        checkpoint='checkpoints/pspnet_r101-d8_512x512_40k_voc12aug_20200613_161222-bc933b18.pth',
    ),
    distillers=dict(
        # 512 channels of the student against 2048 of the teacher, both at stride 8. The loss starts near 2 whatever the
        # models; 1 to 10 is a sensible range of weights.
        nfd=dict(type='NFD', taps='backbone:3', loss_weight=3.0),
    ),
)
