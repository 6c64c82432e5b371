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
    mosaic=0.0,  # the scenes are crowded already
    workers=0,
    device='cpu',
    plots=False,
    verbose=False,
)
