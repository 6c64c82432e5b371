# Generated scenes with labels -> the same kind of scenes in fog, without labels: the student of the demo, taught by the
# moving average of itself.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/make_scenes.py --out work_dirs/scenes_fog --train 800 --val 100 --difficulty 0 --seed 1
#   python tools/dataset_converters/make_fog.py --images work_dirs/scenes_fog/leftImg8bit --out work_dirs/scenes_fog/fog
#   python tools/train.py configs/adaptation/segmentation/meanteacher_resnet18-w12_400_scenes-to-fog.py
#
# Source only, the baseline: the same command with --student-alone. Scores are mIoU on the target's validation set, in
# fog; the log has those of the mean teacher as teacher.mIoU. No score of these settings is measured yet.
_base_ = ['../../demo/segmentation_student.py']

source_root, target_root = 'work_dirs/scenes', 'work_dirs/scenes_fog'

model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.99),  # at 400 iterations it lags a quarter of the run behind; 0.999 would never arrive
    pseudo_labels=dict(
        threshold=0.9
    ),  # lower: more labels, more of them wrong (adapt.kept, adapt.precision in the log)
    pseudo_weight=dict(value=1.0, start=0.25, warmup=0.25),  # a teacher that knows nothing yet teaches nothing yet
    styled_weight=1.0,  # source images in fog colours, under their labels
    consistency_weight=1.1,
)
custom_hooks = [dict(type='kd_dense.AdaptationHook')]  # save='mean_teacher': checkpoints of the average

load_labelled = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
geometry = [dict(type='RandomFlip', prob=0.5)]  # shared by both views of an image, bit for bit
pack = [dict(type='PackSegInputs')]
# Colours of a random image of the other domain: 'color' suits fog, which has one; 'fourier' and 'histogram' are others.
to_target = dict(type='kd_dense.StyleTransfer', folder=f'{target_root}/fog/train', method='color')
to_source = dict(type='kd_dense.StyleTransfer', folder=f'{source_root}/leftImg8bit/train', method='color')

train_dataloader = dict(
    batch_size=4,  # of each domain
    dataset=dict(
        _delete_=True,
        type='kd_dense.PairedDataset',
        source=dict(
            type='kd_dense.SceneDataset',
            data_root=source_root,
            data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=[*load_labelled, *geometry],
                    views=dict(source=pack, styled=[to_target, *pack]),
                )
            ],
        ),
        target=dict(
            type='kd_dense.SceneDataset',
            data_root=target_root,
            # The labels are there to log the precision of the pseudo labels; nothing is trained on them. Where there
            # are none, leave seg_map_path and LoadAnnotations out.
            data_prefix=dict(img_path='fog/train', seg_map_path='gtFine/train'),
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
val_dataloader = dict(dataset=dict(data_root=target_root, data_prefix=dict(img_path='fog/val')))
test_dataloader = val_dataloader
