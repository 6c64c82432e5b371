# SegFormer-B0 on Cityscapes by the recipe of TransKD's authors, as far as MMSegmentation expresses it: whole images of
# half size, values scaled to 0..1, flips and shifts by up to 2 pixels, AdamW of one parameter group, a polynomial of
# degree 1 over 1500 epochs of which 1000 are run, batches of 2, the best checkpoint kept.
#
# Left out: their class weights (MMSegmentation's weighted cross entropy fails on ignored pixels), and labels and scores
# at a quarter of the resolution (here both are of the full one, and the scores not comparable with theirs).
_base_ = ['./segformer_mit-b0-scratch_8xb1-160k_cityscapes-1024x1024.py']

size = (512, 1024)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(1028, 516), keep_ratio=False),
    dict(type='RandomCrop', crop_size=size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 512), keep_ratio=False),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=2,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], size=size),
    test_cfg=dict(_delete_=True, mode='whole'),
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
)
param_scheduler = [dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end=1500, by_epoch=True)]
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1000, val_interval=10)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=10, max_keep_ckpts=2, save_best='mIoU'),
)
log_processor = dict(by_epoch=True)
