# SegFormer-B0 on ACDC by the recipe of TransKD's authors, as on Cityscapes. How the data are read is explained in
# segformer_mit-b0-scratch_4xb4-80k_acdc-512x1024.py.
_base_ = ['./segformer_mit-b0-scratch_1xb2-1000e_cityscapes-512x1024.py']

size = (512, 910)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(914, 516), keep_ratio=False),
    dict(type='RandomCrop', crop_size=size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(910, 512), keep_ratio=False),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
acdc = dict(
    data_root='data/acdc',
    data_prefix=dict(img_path='rgb_anon', seg_map_path='gt'),
    img_suffix='_rgb_anon.png',
    seg_map_suffix='_gt_labelTrainIds.png',
)
train_dataloader = dict(dataset=dict(ann_file='train.txt', pipeline=train_pipeline, **acdc))
val_dataloader = dict(dataset=dict(ann_file='val.txt', pipeline=test_pipeline, **acdc))
test_dataloader = val_dataloader
model = dict(data_preprocessor=dict(size=size))
