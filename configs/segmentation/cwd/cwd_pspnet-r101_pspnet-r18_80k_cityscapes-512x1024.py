# PSPNet R101 -> R18 on Cityscapes, channel-wise divergence of the logits.
#
#   mim download mmsegmentation --config pspnet_r101-d8_4xb2-80k_cityscapes-512x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/cwd/cwd_pspnet-r101_pspnet-r18_80k_cityscapes-512x1024.py
#
# MMSegmentation publishes 79.76 mIoU for this teacher and 74.87 for the student alone; MMRazor publishes 75.54 for its
# own CWD recipe of this pair (temperature 1, weight 5). Our distilled score is not measured here.
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
        # At temperature 1 each channel attends to few positions; the paper's 4 spreads it.
        cwd=dict(type='CWD', taps='logits', temperature=1.0, loss_weight=5.0),
    ),
)
