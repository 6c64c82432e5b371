# Cityscapes with boxes -> Foggy Cityscapes without, 8 classes: Faster R-CNN R50 from ImageNet's weights, shorter side
# 600 pixels.
#
#   python tools/train.py configs/adaptation/detection/meanteacher_faster-rcnn_r50_cityscapes-to-foggy.py
#   bash tools/dist_train.sh configs/adaptation/detection/meanteacher_faster-rcnn_r50_cityscapes-to-foggy.py 4
#
# data/cityscapes has leftImg8bit, leftImg8bit_foggy and annotations, which tools/dataset_converters/cityscapes2coco.py
# writes; see docs/adaptation.md. The learning rate is for 8 images of each domain in a step: four GPUs with two each,
# or --auto-scale-lr.
#
# Source only, the baseline: the same command with --student-alone. Scores are AP (bbox_mAP_50 is what papers on this
# pair of domains report) on the 500 foggy images of the validation set; the log has those of the mean teacher as
# teacher.coco/bbox_mAP_50. No score of these settings is measured yet.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/cityscapes_detection.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['kd_dense'], allow_failed_imports=False)

data_root = 'data/cityscapes'

_base_.model.roi_head.bbox_head.num_classes = 8
# The settings of the teacher and its labels are our choice for a detector that is sure of what it finds, with a first
# quarter of the run on the source alone. SSDA-YOLO, for YOLOv5: decay=0.99, score_threshold=0.5, pseudo_weight=0.005
# from the start (the defaults).
model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.999),
    pseudo_labels=dict(score_threshold=0.8, iou_threshold=0.5, max_count=100),
    pseudo_weight=dict(value=1.0, start=0.25, warmup=0.05),  # 0: no mean teacher
    styled_weight=1.0,  # 0, with consistency_weight=0: no styled images
    consistency_weight=1.1,
)
custom_hooks = [dict(type='kd_dense.AdaptationHook')]  # save='mean_teacher': checkpoints of the average

load_labelled = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
geometry = [  # shared by both views of an image, bit for bit
    dict(type='Resize', scale=(1200, 600), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
]
pack = [dict(type='PackDetInputs')]
# Colours of a random image of the other domain: 'color' suits fog, which has one; 'fourier' and 'histogram' are others.
# Translations by a network (CUT, as in SSDA-YOLO) are read by kd_dense.StackTranslation; see docs/adaptation.md.
to_target = dict(
    type='kd_dense.StyleTransfer',
    folder=f'{data_root}/leftImg8bit_foggy/train',
    suffix='_beta_0.02.png',  # of three densities the thickest, that of the annotations
    method='color',
)
to_source = dict(type='kd_dense.StyleTransfer', folder=f'{data_root}/leftImg8bit/train', method='color')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1200, 600), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    _delete_=True,
    batch_size=2,  # of each domain
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='kd_dense.PairedDataset',
        source=dict(
            type='CityscapesDataset',
            data_root=data_root,
            ann_file='annotations/instancesonly_filtered_gtFine_train.json',
            data_prefix=dict(img='leftImg8bit/train/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[*load_labelled, *geometry],
                    views=dict(source=[dict(type='PhotoMetricDistortion'), *pack], styled=[to_target, *pack]),
                )
            ],
        ),
        target=dict(
            # The labels are there to log the precision of the pseudo labels; nothing is trained on them. Where there
            # are none: dict(type='kd_dense.ImageFolder', data_prefix=dict(img_path=...)), without LoadAnnotations.
            type='CityscapesDataset',
            data_root=data_root,
            ann_file='annotations/foggy_train.json',
            data_prefix=dict(img='leftImg8bit_foggy/train/'),
            filter_cfg=dict(filter_empty_gt=False),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[*load_labelled, *geometry],
                    views=dict(target=[dict(type='PhotoMetricDistortion'), *pack], teacher=[to_source, *pack]),
                )
            ],
        ),
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/foggy_val.json',
        data_prefix=dict(img='leftImg8bit_foggy/val/'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/foggy_val.json')
test_evaluator = val_evaluator

max_iters = 40000
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[30000], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=2)
)
log_processor = dict(by_epoch=False)
