# The teacher of the instance segmentation rows; data and schedule of the YOLO demo.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/train.py configs/yolo/teachers/c2f-seg-w16_10e_scenes.py
_base_ = ['../../demo/yolo_teacher.py']

student = 'configs/yolo/scenes/seg_teacher.yaml'
train = dict(val=False)
