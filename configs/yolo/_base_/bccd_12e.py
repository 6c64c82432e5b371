# BCCD for a CPU: 12 epochs at 160 pixels, of the small models of the demo. Data as in bccd_100e.py.
_base_ = ['./bccd_100e.py']

student = 'configs/demo/yolo_student.yaml'
train = dict(epochs=12, imgsz=160, workers=0, device='cpu', plots=False)
