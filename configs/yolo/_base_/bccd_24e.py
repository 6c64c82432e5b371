# BCCD for a CPU: 24 epochs at 160 pixels, of the small models of the demo. Data as in bccd_100e.py.
_base_ = ['./bccd_100e.py']

student = 'configs/demo/yolo_student.yaml'
train = dict(
    epochs=24,
    imgsz=160,
    warmup_epochs=1.0,  # three of a hundred epochs would be three of 24
    val=False,  # once, at the end: after every epoch it takes a third of the time
    workers=0,
    device='cpu',
    plots=False,
)
