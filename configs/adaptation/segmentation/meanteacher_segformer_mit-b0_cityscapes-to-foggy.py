# Cityscapes with labels -> Foggy Cityscapes without: SegFormer B0 by MMSegmentation's recipe, a quarter as long.
#
# data/cityscapes: leftImg8bit, leftImg8bit_foggy and gtFine, the latter with *_labelTrainIds.png files, which
# cityscapesscripts writes: CITYSCAPES_DATASET=data/cityscapes csCreateTrainIdLabelImgs
#
#   python tools/train.py configs/adaptation/segmentation/meanteacher_segformer_mit-b0_cityscapes-to-foggy.py
#   tools/dist_train.sh configs/adaptation/segmentation/meanteacher_segformer_mit-b0_cityscapes-to-foggy.py 8
#
# The learning rate is that of 8 processes with one image of each domain. Source only, the baseline: the same command
# with --student-alone. Scores are mIoU on the target's validation set, in fog; the log has those of the mean teacher as
# teacher.mIoU. No score of these settings is measured yet.
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', '../../_base_/runtime.py']

data_root = 'data/cityscapes/'
foggy = dict(  # beta: density of the fog, 0.005, 0.01 or 0.02; all three lie in the same folders
    data_root=data_root, img_suffix='_leftImg8bit_foggy_beta_0.02.png'
)

model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.999),  # it lags 1000 iterations behind
    pseudo_labels=dict(threshold=0.9),  # lower: more labels, more of them wrong (see adapt.precision)
    pseudo_weight=dict(value=1.0, start=0.1, warmup=0.1),  # a new teacher knows nothing yet; 0: off
    styled_weight=1.0,  # source images in fog colours, under their labels; without: leave the view `styled` out
    consistency_weight=1.1,  # 0: off
)
custom_hooks = [dict(type='kd_dense.AdaptationHook')]  # save='mean_teacher': checkpoints of the average

load_labelled = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
resize = dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True)
flip = dict(type='RandomFlip', prob=0.5)
distort = dict(type='PhotoMetricDistortion')
pack = [dict(type='PackSegInputs')]
# Colours of a random image of the other domain: 'color' suits fog, which has one; 'fourier' and 'histogram' are others.
to_target = dict(
    type='kd_dense.StyleTransfer',
    folder=f'{data_root}leftImg8bit_foggy/train',
    suffix=foggy['img_suffix'],
    method='color',
)
to_source = dict(type='kd_dense.StyleTransfer', folder=f'{data_root}leftImg8bit/train', method='color')

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='kd_dense.PairedDataset',
        source=dict(
            type='CityscapesDataset',
            data_root=data_root,
            data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[
                        *load_labelled,
                        resize,
                        dict(type='RandomCrop', crop_size=(1024, 1024), cat_max_ratio=0.75),
                        flip,
                    ],
                    views=dict(source=[distort, *pack], styled=[to_target, *pack]),
                )
            ],
        ),
        target=dict(
            type='CityscapesDataset',
            # The labels are there to log the precision of the pseudo labels; nothing is trained on them, and the crop
            # does not look at them. Where there are none, leave seg_map_path and LoadAnnotations out.
            data_prefix=dict(img_path='leftImg8bit_foggy/train', seg_map_path='gtFine/train'),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[*load_labelled, resize, dict(type='RandomCrop', crop_size=(1024, 1024)), flip],
                    views=dict(target=[distort, *pack], teacher=[to_source, *pack]),
                )
            ],
            **foggy,
        ),
    ),
)
val_dataloader = dict(dataset=dict(data_prefix=dict(img_path='leftImg8bit_foggy/val'), **foggy))
test_dataloader = val_dataloader

max_iters = 40000
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
