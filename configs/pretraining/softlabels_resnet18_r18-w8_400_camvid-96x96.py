# For a CPU: the student of the CamVid configs, a ResNet-18 of an eighth of the usual width, pre-trained on what
# torchvision's ResNet-18 says about crops of the CamVid training images, whose labels are not looked at.
# The teacher's file is that of torchvision.models.ResNet18_Weights.IMAGENET1K_V1.
#
#   name=softlabels_resnet18_r18-w8_400_camvid-96x96
#   python tools/cache_teacher.py configs/pretraining/$name.py --views 8 --cache work_dirs/$name/cache
#   python tools/train.py configs/pretraining/$name.py
#   python tools/train.py configs/segmentation/camvid/r18-w8_400_camvid-240x180.py \
#       --work-dir work_dirs/from_pretrained --cfg-options model.backbone.init_cfg.type=Pretrained \
#       model.backbone.init_cfg.prefix=backbone. model.backbone.init_cfg.checkpoint=work_dirs/$name/iter_400.pth
#
# The last command without --cfg-options trains the same segmentor from scratch. No score of these settings is measured
# yet.
_base_ = ['../_base_/images_224.py']

model = dict(
    type='kd_dense.BackbonePretraining',
    student='configs/segmentation/camvid/r18-w8_400_camvid-240x180.py',
    teacher=dict(
        config='torchvision.models:resnet18',
        checkpoint='checkpoints/resnet18-f37072fd.pth',
        cache='work_dirs/softlabels_resnet18_r18-w8_400_camvid-96x96/cache',
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='kd_dense.TorchvisionTransforms',
        transforms=[
            dict(type='RandomResizedCrop', size=96, scale=(0.05, 0.5), interpolation='bicubic'),
            dict(type='RandomHorizontalFlip'),
        ],
    ),
    dict(type='kd_dense.PackImage'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_root='{{$KD_DENSE_CAMVID:data/camvid}}',
        data_prefix=dict(img_path='images/train'),
        pipeline=train_pipeline,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=400),
]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=400)
default_hooks = dict(logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=200))
log_processor = dict(by_epoch=False)
