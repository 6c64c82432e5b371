# python tools/compare.py configs/demo/yolo.py --seeds 0 --work-dir work_dirs/demo_yolo
# (make demo TASK=yolo generates the data and trains the teacher first)
student = 'configs/demo/yolo_student.yaml'
teacher = dict(checkpoint='work_dirs/demo_yolo/teacher/weights/last.pt')
distillers = dict(
    # The levels that feed the head, where the teacher sees an object: the loss that Ultralytics ships.
    native=dict(type='Native', loss_weight=6.0),
)
data = 'work_dirs/scenes/scenes.yaml'
train = dict(
    epochs=6,
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
