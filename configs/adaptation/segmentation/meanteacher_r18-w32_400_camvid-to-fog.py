# CamVid with labels -> CamVid in fog without: real road scenes that a CPU can train on.
#
#   python tools/dataset_converters/make_weather.py --kind fog --images data/camvid/images \
#       --out data/camvid_adaptation/fog
#   python tools/train.py configs/adaptation/segmentation/meanteacher_r18-w32_400_camvid-to-fog.py
#
# Source only, the baseline: the same command with --student-alone. Scores are mIoU on the validation set in fog; the
# log has those of the mean teacher as teacher.mIoU. Night instead of fog: --kind night there, KD_DENSE_WEATHER=night in
# the environment here. The numbers of all parts are in docs/results.md.
_base_ = ['../../segmentation/camvid/r18-w32_400_camvid-240x180.py']

camvid_root = '{{$KD_DENSE_CAMVID:data/camvid}}'
target_root = '{{$KD_DENSE_CAMVID_ADAPTATION:data/camvid_adaptation}}/{{$KD_DENSE_WEATHER:fog}}'

model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.99),
    pseudo_labels=dict(threshold=0.9),
    pseudo_weight=dict(value=1.0, start=0.3, warmup=0.2),  # a teacher that knows nothing yet teaches nothing yet
    styled_weight=1.0,  # source images in the colours of fog, under their labels
    consistency_weight=1.1,
)
custom_hooks = [dict(type='kd_dense.AdaptationHook')]  # save='mean_teacher': checkpoints of the average

geometry = [  # shared by both views of an image, bit for bit
    dict(type='RandomResize', scale=(240, 180), ratio_range=(0.8, 1.6), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(160, 224)),  # cat_max_ratio would read the labels of the target
    dict(type='RandomFlip', prob=0.5),
]
load_labelled = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
pack = [dict(type='PackSegInputs')]
# Colours of a random image of the other domain. 'fourier' and 'histogram' are others.
to_target = dict(type='kd_dense.StyleTransfer', folder=f'{target_root}/train', method='color')
to_source = dict(type='kd_dense.StyleTransfer', folder=f'{camvid_root}/images/train', method='color')

train_dataloader = dict(
    batch_size=4,  # of each domain
    dataset=dict(
        _delete_=True,
        type='kd_dense.PairedDataset',
        source=dict(
            type='kd_dense.CamVidDataset',
            data_root=camvid_root,
            data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[*load_labelled, *geometry],
                    views=dict(source=[dict(type='PhotoMetricDistortion'), *pack], styled=[to_target, *pack]),
                )
            ],
        ),
        target=dict(
            type='kd_dense.CamVidDataset',
            # The labels are there to log the precision of the pseudo labels; nothing is trained on them. Where there
            # are none, leave seg_map_path and LoadAnnotations out.
            data_prefix=dict(img_path=f'{target_root}/train', seg_map_path=f'{camvid_root}/labels/train'),
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
        data_root=None,
        data_prefix=dict(img_path=f'{target_root}/val', seg_map_path=f'{camvid_root}/labels/val'),
    )
)
test_dataloader = val_dataloader
