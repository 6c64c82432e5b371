# CamVid with boxes -> CamVid in fog without: cars, pedestrians and bicyclists in real road scenes, for a CPU.
#
#   python tools/dataset_converters/make_weather.py --kind fog --images data/camvid/images \
#       --out data/camvid_adaptation/fog
#   for split in train val; do python tools/dataset_converters/labels2coco.py --images data/camvid/images/$split \
#       --labels data/camvid/labels/$split --classes car=8 pedestrian=9 bicyclist=10 --min-side 8 \
#       --out data/camvid_adaptation/annotations/$split.json; done
#   python tools/train.py configs/adaptation/detection/meanteacher_gfl_r18-w16_camvid-to-fog.py
#
# Source only, the baseline: the same command with --student-alone. Scores are AP on the validation set in fog; the log
# has those of the mean teacher as teacher.coco/bbox_mAP. From scratch, 600 iterations on the source alone end at 0.3 AP
# in fog; the numbers in docs/results.md begin with a detector that was trained by day.
#
# To leave parts out, with --cfg-options:
#   styled images               model.styled_weight=0 model.consistency_weight=0
#   consistency                 model.consistency_weight=0
#   mean teacher                model.pseudo_weight=0
#   style of the teacher's view train_dataloader.dataset.target.pipeline.0.views.teacher.0.prob=0
# Another style: train_dataloader.dataset.source.pipeline.0.views.styled.0.method=fourier, and ...teacher.0.method. What
# labels of the target would give: --student-alone with
# train_dataloader.dataset.source.data_prefix.img=data/camvid_adaptation/fog/train
_base_ = ['../../_base_/gfl_r18-w16.py', '../../_base_/cpu_iters.py']

custom_imports = dict(imports=['kd_dense'], allow_failed_imports=False)
default_scope = 'mmdet'

camvid_root = '{{$KD_DENSE_CAMVID:data/camvid}}'
made_root = '{{$KD_DENSE_CAMVID_ADAPTATION:data/camvid_adaptation}}'
metainfo = dict(classes=('car', 'pedestrian', 'bicyclist'))

model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.99),  # at 600 iterations it lags a sixth of the run behind; 0.999 would never arrive
    # Scores of a detector trained this shortly are low. A lower threshold gives more labels, and more of them wrong:
    # adapt.per_image and adapt.precision in the log.
    pseudo_labels=dict(score_threshold=0.4, iou_threshold=0.5, max_count=50),
    pseudo_weight=dict(value=1.0, start=0.4, warmup=0.2),  # a teacher that knows nothing yet teaches nothing yet
    styled_weight=1.0,  # source images in the colours of fog, under their labels
    consistency_weight=1.1,
)
custom_hooks = [dict(type='kd_dense.AdaptationHook')]  # save='mean_teacher': checkpoints of the average

# -- data --------------------------------------------------------------------------------------------------------------
load_labelled = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
geometry = [  # shared by both views of an image, bit for bit
    dict(type='RandomResize', scale=(320, 240), ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(288, 224), allow_negative_crop=True),
    dict(type='RandomFlip', prob=0.5),
]
pack = [dict(type='PackDetInputs')]
# Colours of a random image of the other domain. 'fourier' and 'histogram' are other methods.
to_target = dict(type='kd_dense.StyleTransfer', folder=f'{made_root}/fog/train', method='color', prob=1.0)
to_source = dict(type='kd_dense.StyleTransfer', folder=f'{camvid_root}/images/train', method='color', prob=1.0)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(320, 240), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=8,  # of each domain
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='kd_dense.PairedDataset',
        source=dict(
            type='CocoDataset',
            metainfo=metainfo,
            ann_file=f'{made_root}/annotations/train.json',
            data_prefix=dict(img=f'{camvid_root}/images/train'),
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
            type='CocoDataset',
            metainfo=metainfo,
            ann_file=f'{made_root}/annotations/train.json',
            data_prefix=dict(img=f'{made_root}/fog/train'),
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
    batch_size=1,
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        metainfo=metainfo,
        ann_file=f'{made_root}/annotations/val.json',
        data_prefix=dict(img=f'{made_root}/fog/val'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=f'{made_root}/annotations/val.json', metric='bbox', format_only=False)
test_evaluator = val_evaluator

max_iters = 600
optim_wrapper = dict(clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters, T_max=max_iters - 50),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=200)
