# Pascal VOC 2007+2012 with boxes -> Clipart1k without, 20 classes: the protocol of SSDA-YOLO, with YOLO11-L in place of
# YOLOv5-L.
#
#   python tools/dataset_converters/voc2coco.py --help    # writes the boxes of data/VOCdevkit as COCO files
#   python tools/dataset_converters/coco2yolo.py --help   # makes data/voc_yolo and data/clipart_yolo of them
#   python tools/train.py configs/adaptation/yolo/meanteacher_yolo11-l_voc-to-clipart.py
#
# Source only, the baseline: the same command with --student-alone. No score of these settings is measured yet.
student = dict(model='yolo11l.yaml', pretrained='checkpoints/yolo11l.pt')  # Ultralytics' file, trained on COCO
data = 'data/voc_yolo/data.yaml'  # the source
adaptation = dict(
    target='data/clipart_yolo/data.yaml',
    # The paper translates both sets once, by CycleGAN. With such images at hand, named as the originals:
    # translated_source='data/voc_as_clipart', translated_target='data/clipart_as_voc',
    style=dict(method='fourier', beta=0.05),
    mean_teacher=dict(decay=0.99),
    pseudo_labels=dict(score_threshold=0.5, iou_threshold=0.3, max_count=20),
    pseudo_weight=0.005,
    consistency_weight=1.1,  # free of the size of the task loss; behaviour='official' has the released code's form, 2.0
)
train = dict(
    epochs=200,
    imgsz=960,
    batch=24,  # of each domain, over all GPUs
    optimizer='SGD',
    lr0=0.01,
    lrf=0.2,
    cos_lr=True,
    momentum=0.937,
    weight_decay=0.0005,
    warmup_epochs=3.0,
    warmup_bias_lr=0.1,
    close_mosaic=0,
    patience=0,  # no early end
)
