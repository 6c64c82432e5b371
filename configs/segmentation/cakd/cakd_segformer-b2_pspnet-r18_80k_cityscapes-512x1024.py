# SegFormer B2 -> PSPNet R18 on Cityscapes, cross-architecture distillation of the last stage.
#
#   mim download mmsegmentation --config segformer_mit-b2_8xb1-160k_cityscapes-1024x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/cakd/cakd_segformer-b2_pspnet-r18_80k_cityscapes-512x1024.py
#
# MMSegmentation publishes 81.08 mIoU for this teacher and 74.87 for the student alone. The distilled score is not
# measured here.
_base_ = ['mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
        checkpoint='checkpoints/segformer_mit-b2_8x1_1024x1024_160k_cityscapes_20211207_134205-6096669a.pth',
    ),
    distillers=dict(
        cakd=dict(
            type='CAKD',
            # The last block of the last stage, where every token attends to all. The student's last stage has stride 8,
            # the teacher's 32: the student's map is averaged over 4 x 4 cells.
            attention='backbone.layers.3.1.2.attn.attn',
            taps='backbone:3',
            loss_weight=dict(type='auto', share=0.5, start=0.21, warmup=0.08),
        ),
    ),
)
