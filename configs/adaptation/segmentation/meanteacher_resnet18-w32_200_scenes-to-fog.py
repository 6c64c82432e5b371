# Generated scenes with labels -> the same kind of scenes in fog, without labels: a student that was trained by day, the
# teacher of the other demos, is taught by the moving average of itself. `make demo TASK=adaptation` does all of this.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/make_scenes.py --out work_dirs/scenes_fog --train 800 --val 100 --difficulty 0 --seed 1
#   python tools/dataset_converters/make_weather.py --kind fog --images work_dirs/scenes_fog/leftImg8bit \
#       --out work_dirs/scenes_fog/fog
#   python tools/train.py configs/demo/segmentation_teacher.py --work-dir work_dirs/demo_segmentation/teacher
#   python tools/train.py configs/adaptation/segmentation/meanteacher_resnet18-w32_200_scenes-to-fog.py
#
# Source only, the baseline: the same command with --student-alone. Scores are mIoU on the target's validation set, in
# fog; the log has those of the mean teacher as teacher.mIoU. The numbers are in docs/adaptation.md.
_base_ = ['../../demo/segmentation_teacher.py']

source_root, target_root = 'work_dirs/scenes', 'work_dirs/scenes_fog'
# A student that knows nothing finds nothing but background to label, and is taught that there is nothing else.
load_from = 'work_dirs/demo_segmentation/teacher/iter_800.pth'

model = dict(
    _delete_=True,
    type='kd_dense.MeanTeacherAdaptation',
    student={{_base_.model}},
    mean_teacher=dict(decay=0.99),  # it lags half of the run behind; 0.999 would stay where it began
    pseudo_labels=dict(threshold=0.9),  # lower: more labels, more of them wrong (adapt.kept, adapt.precision)
    pseudo_weight=1.0,  # from the start: the teacher has learned by day; else begin later, dict(value=1.0, start=0.25)
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

optim_wrapper = dict(optimizer=dict(lr=5e-4))
max_iters = 200
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=0.9, eta_min=1e-5, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=50)
