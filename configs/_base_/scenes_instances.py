# Generated scenes with instance masks; data and folder as in scenes_detection.py. The score is the AP of the masks.
_base_ = ['./scenes_detection.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=['segm', 'bbox'])
test_evaluator = val_evaluator
