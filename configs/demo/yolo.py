# python tools/compare.py configs/demo/yolo.py --seeds 0 --work-dir work_dirs/demo_yolo
# (make demo TASK=yolo generates the data and trains the teacher first)
_base_ = ['./yolo_teacher.py']

student = 'configs/demo/yolo_student.yaml'
teacher = dict(checkpoint='work_dirs/demo_yolo/teacher/weights/last.pt')
distillers = dict(
    # The levels that feed the head, where the teacher sees an object: the loss that Ultralytics ships.
    native=dict(type='Native', loss_weight=6.0),
)
train = dict(epochs=6)
