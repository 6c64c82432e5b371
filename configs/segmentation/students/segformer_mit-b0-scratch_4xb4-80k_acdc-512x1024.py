# SegFormer-B0 on ACDC (Cityscapes' classes in fog, night, rain and snow), from random weights. MMSegmentation has no
# class for ACDC; its Cityscapes class reads it with other file suffixes. The splits are spread over the four conditions
# (rgb_anon/fog/train, ...), so that two lists name their files:
#
#   for s in train val; do
#     (cd data/acdc/rgb_anon && ls */$s/*/*_rgb_anon.png | sed s/_rgb_anon.png//) > data/acdc/$s.txt
#   done
_base_ = ['./segformer_mit-b0-scratch_8xb1-160k_cityscapes-1024x1024.py']

crop_size = (512, 1024)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(1920, 1080), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
acdc = dict(
    data_root='data/acdc',
    data_prefix=dict(img_path='rgb_anon', seg_map_path='gt'),
    img_suffix='_rgb_anon.png',
    seg_map_suffix='_gt_labelTrainIds.png',
)
train_dataloader = dict(batch_size=4, dataset=dict(ann_file='train.txt', pipeline=train_pipeline, **acdc))
val_dataloader = dict(dataset=dict(ann_file='val.txt', pipeline=test_pipeline, **acdc))
test_dataloader = val_dataloader
model = dict(data_preprocessor=dict(size=crop_size), test_cfg=dict(_delete_=True, mode='whole'))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=80000, by_epoch=False),
]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
