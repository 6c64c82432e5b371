# CamVid with boxes -> CamVid in fog without: cars, pedestrians and bicyclists, on a CPU.
#
#   python tools/dataset_converters/labels2coco.py --images data/camvid/images/train --labels data/camvid/labels/train \
#       --classes car=8 pedestrian=9 bicyclist=10 --min-side 8 --out data/camvid_adaptation/annotations/train.json
#   python tools/dataset_converters/make_weather.py --kind fog --images data/camvid/images \
#       --out data/camvid_adaptation/fog
#   python tools/dataset_converters/coco2yolo.py --images data/camvid/images/train --split train \
#       --json data/camvid_adaptation/annotations/train.json --out data/camvid_adaptation/yolo_clear
#   python tools/dataset_converters/coco2yolo.py --images data/camvid_adaptation/fog/train --split train \
#       --json data/camvid_adaptation/annotations/train.json --out data/camvid_adaptation/yolo_fog
#   (the commands that name train a second time with val)
#   python tools/train.py configs/adaptation/yolo/meanteacher_c2f-w8_camvid-to-fog.py
#
# Source only, the baseline: the same command with --student-alone, which takes as many steps. Scores are mAP50-95 on
# the validation images in fog; results.csv has those of the mean teacher as teacher/mAP50-95. Night instead of fog:
# --kind night and yolo_night there, KD_DENSE_WEATHER=night in the environment here. The numbers in docs/results.md
# begin with a detector that was trained by day.
_made = '{{$KD_DENSE_CAMVID_ADAPTATION:data/camvid_adaptation}}'

student = 'configs/demo/yolo_student.yaml'
data = f'{_made}/yolo_clear/data.yaml'  # the source
# To switch a part off: --cfg-options adaptation.style=None, adaptation.consistency_weight=0,
# adaptation.pseudo_weight=0; or, with the style for the teacher alone, adaptation.styled_weight=0 and
# adaptation.consistency_weight=0 together.
adaptation = dict(
    # train: what is adapted to, its label files for the precision of pseudo labels alone; val: what is scored. A folder
    # of images would do for train.
    target=f'{_made}/yolo_' + '{{$KD_DENSE_WEATHER:fog}}' + '/data.yaml',
    style=dict(method='color'),  # 'fourier' and 'histogram' are others
    mean_teacher=dict(decay=0.99),
    pseudo_labels=dict(score_threshold=0.5),
    # SSDA-YOLO has 0.005 from the beginning; a short run has to learn more from them, once the teacher knows something.
    pseudo_weight=dict(value=0.5, start=0.3, warmup=0.2),
    styled_weight=1.0,
    consistency_weight=1.1,
)
train = dict(
    epochs=12,
    imgsz=192,
    batch=8,  # of each domain
    nbs=8,  # Ultralytics gathers gradients of 64 images by default: too few steps for so short a training
    optimizer='AdamW',
    lr0=0.002,
    warmup_epochs=1.0,
    close_mosaic=0,
    mosaic=0.5,
    workers=0,
    device='cpu',
    plots=False,
)
