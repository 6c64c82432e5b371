# UPerNet Swin-T -> R18 on Cityscapes, cross-architecture distillation of the last stage. Train the teacher first.
#
#   python tools/train.py configs/segmentation/teachers/upernet_swin-t_4xb2-80k_cityscapes-512x1024.py
#   python tools/train.py configs/segmentation/cakd/cakd_upernet-swin-t_upernet-r18_80k_cityscapes-512x1024.py
#
# Nobody publishes a score of teacher, student or distilled student for this pair, and none is measured here.
_base_ = ['mmseg::upernet/upernet_r18_4xb2-80k_cityscapes-512x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/teachers/upernet_swin-t_4xb2-80k_cityscapes-512x1024.py',
        checkpoint='work_dirs/upernet_swin-t_4xb2-80k_cityscapes-512x1024/iter_80000.pth',
    ),
    distillers=dict(
        cakd=dict(
            type='CAKD',
            # the first block of the last stage; the second shifts its windows
            attention='backbone.stages.3.blocks.0.attn.w_msa',
            taps='backbone:3',
            # One linear layer per 4 x 4 tokens of the 16 x 32 grid. Crops of several sizes would need mode='grid'.
            linear=dict(mode='tile', dropout=0.1),
            # Half of the images are jittered and masked for the student. views=False trains on clean ones.
            views=dict(prob=0.5),
            # The discriminator learns every 5 iterations, at a hundredth of the student's rate.
            adversary=dict(interval=5, lr_mult=0.01),
            # Nothing in the first fifth of the training, then a rise to half of the gradient of the task there.
            loss_weight=dict(type='auto', share=0.5, start=0.21, warmup=0.08),
        ),
    ),
)
