# YOLO26 s -> n on COCO, the loss that Ultralytics ships.
#
#   python tools/train.py configs/yolo/native/native_yolo26-s_yolo26-n_100e_coco.py
#   python tools/test.py configs/yolo/native/native_yolo26-s_yolo26-n_100e_coco.py \
#       work_dirs/native_yolo26-s_yolo26-n_100e_coco/weights/best.pt
#   python tools/train.py configs/yolo/native/native_yolo26-s_yolo26-n_100e_coco.py --student-alone \
#       --work-dir work_dirs/yolo26-n_100e_coco                        # the same training without the teacher
#
# Published by Ultralytics, for its own and longer recipe of this pair (mAP50-95 on val2017): 40.9 alone, 41.5
# distilled, 48.6 the teacher. This schedule: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo26n.yaml'
# yolo26s.pt is Ultralytics' release file: download it once and give its path; it is never fetched for you.
teacher = dict(checkpoint='checkpoints/yolo26s.pt', config='yolo26s.yaml')
distillers = dict(
    # Squared error of the three levels that feed the head, weighted by the teacher's class scores (mean of its two
    # branches). 6 is Ultralytics' own default; a larger weight follows the teacher more closely, and its mistakes too.
    native=dict(type='Native', loss_weight=6.0),
)
