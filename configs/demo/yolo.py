# python tools/compare.py configs/demo/yolo.py --seeds 0 --work-dir work_dirs/demo_yolo
# (make demo TASK=yolo generates the data and trains the teacher first)
_base_ = ['./yolo_teacher.py']

student = 'configs/demo/yolo_student.yaml'
teacher = dict(checkpoint='work_dirs/demo_yolo/teacher/weights/last.pt')
distillers = dict(
    # Class predictions at every cell, at the start with as much gradient at the class logits as the task has there.
    logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=1.0)),
)
train = dict(epochs=6)
