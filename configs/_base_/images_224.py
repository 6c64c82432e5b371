# A folder of images without labels, 224 x 224, and the schedule of TinyViT's distilled pre-training (Wu et al., ECCV
# 2022): AdamW, 90 epochs, 5 of them warm-up, cosine, weight decay 0.01, gradients clipped at 5.
# The folder is data/imagenet/train, or what KD_DENSE_IMAGES says. It may have folders in it.
# The paper's RandAugment is that of timm (magnitude 9, varied by 0.5); torchvision's is another scale of the same idea.
# Its random erasing with noise is left out.
custom_imports = dict(imports=['kd_dense'], allow_failed_imports=False)
default_scope = 'mmengine'

size = 224
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='kd_dense.TorchvisionTransforms',
        transforms=[
            dict(type='RandomResizedCrop', size=size, interpolation='bicubic'),
            dict(type='RandomHorizontalFlip'),
            dict(type='RandAugment', num_ops=2, magnitude=9, interpolation='bilinear'),
        ],
    ),
    dict(type='kd_dense.PackImage'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='kd_dense.ImageFolder',
        data_root='{{$KD_DENSE_IMAGES:data/imagenet/train}}',
        data_prefix=dict(img_path=''),
        pipeline=train_pipeline,
    ),
)

auto_scale_lr = dict(enable=False, base_batch_size=1024)  # 8 GPUs of 128; with another number --auto-scale-lr
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(attention_biases=dict(decay_mult=0.0))
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=2e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=90, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=90)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
custom_hooks = [dict(type='kd_dense.PretrainingHook')]
env_cfg = dict(
    cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=1), dist_cfg=dict(backend='nccl')
)
log_level = 'INFO'
randomness = dict(seed=0)
load_from = None
resume = False
