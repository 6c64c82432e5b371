# SegFormer-B0 on the 40 classes of NYUv2, from random weights. MMSegmentation's own NYU data set is for depth, so its
# base class reads images/train, images/test, labels/train and labels/test of data/nyuv2: PNG files of the same names,
# with 0 for void and 1 to 40 for the classes.
_base_ = ['./segformer_mit-b0-scratch_8xb1-160k_cityscapes-1024x1024.py']

crop_size = (480, 640)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(640, 480), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
# fmt: off
classes = (
    'wall', 'floor', 'cabinet', 'bed', 'chair', 'sofa', 'table', 'door', 'window', 'bookshelf', 'picture', 'counter',
    'blinds', 'desk', 'shelves', 'curtain', 'dresser', 'pillow', 'mirror', 'floor mat', 'clothes', 'ceiling', 'books',
    'refrigerator', 'television', 'paper', 'towel', 'shower curtain', 'box', 'whiteboard', 'person', 'night stand',
    'toilet', 'sink', 'lamp', 'bathtub', 'bag', 'other structure', 'other furniture', 'other prop',
)
# fmt: on
nyuv2 = dict(
    type='BaseSegDataset',
    data_root='data/nyuv2',
    metainfo=dict(classes=classes),
    img_suffix='.png',
    seg_map_suffix='.png',
    reduce_zero_label=True,  # 0 becomes 255, which is ignored, and 1 to 40 become 0 to 39
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'), pipeline=train_pipeline, **nyuv2
    ),
)
val_dataloader = dict(
    dataset=dict(data_prefix=dict(img_path='images/test', seg_map_path='labels/test'), pipeline=test_pipeline, **nyuv2)
)
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=40),
    test_cfg=dict(_delete_=True, mode='whole'),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=40000, by_epoch=False),
]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
