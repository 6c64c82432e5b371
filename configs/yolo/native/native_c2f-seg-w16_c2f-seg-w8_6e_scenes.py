# Instance segmentation of generated scenes on a CPU, the loss that Ultralytics ships. The numbers: docs/results.md.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/train.py configs/yolo/teachers/c2f-seg-w16_10e_scenes.py
#   python tools/train.py configs/yolo/native/native_c2f-seg-w16_c2f-seg-w8_6e_scenes.py
_base_ = ['../teachers/c2f-seg-w16_10e_scenes.py']

student = 'configs/yolo/scenes/seg_student.yaml'
teacher = dict(checkpoint='work_dirs/c2f-seg-w16_10e_scenes/weights/last.pt')
distillers = dict(
    # The weight is Ultralytics' own default (its dis=6).
    native=dict(type='Native', loss_weight=6.0),
)
train = dict(epochs=6)
