# The teacher of the YOLO demo.
student = 'configs/demo/yolo_teacher.yaml'
data = 'work_dirs/scenes/scenes.yaml'
train = dict(
    epochs=10,
    imgsz=128,
    batch=16,
    nbs=16,  # Ultralytics gathers gradients of 64 images by default: too few steps for so short a training
    optimizer='AdamW',
    lr0=0.002,
    warmup_epochs=1.0,
    close_mosaic=0,
    # The scenes vary enough: what is left of the augmentation is colour and flips.
    mosaic=0.0,
    scale=0.0,
    translate=0.0,
    # Half-trained students find hundreds of boxes per image; without the least certain ones validation takes seconds.
    conf=0.01,
    iou=0.6,
    workers=0,
    device='cpu',
    plots=False,
    verbose=False,
)
