# Cityscapes with boxes -> Foggy Cityscapes without, 8 classes: the protocol of SSDA-YOLO, with YOLO11-L in place of
# YOLOv5-L.
#
#   python tools/dataset_converters/cityscapes2coco.py --help   # writes the boxes of both domains as COCO files
#   python tools/dataset_converters/coco2yolo.py --help         # makes data/cityscapes_yolo, data/cityscapes_foggy_yolo
#   python tools/train.py configs/adaptation/yolo/meanteacher_yolo11-l_cityscapes-to-foggy.py
#
# Source only, the baseline: the same command with --student-alone. No score of these settings is measured yet.
_base_ = ['./meanteacher_yolo11-l_voc-to-clipart.py']

data = 'data/cityscapes_yolo/data.yaml'  # the source
adaptation = dict(
    target='data/cityscapes_foggy_yolo/data.yaml',
    # The paper translates both sets once, by CUT: translated_source and translated_target name such folders.
    style=dict(method='fourier', beta=0.01),
)
train = dict(imgsz=960)  # that of the paper for these sets is not confirmed
