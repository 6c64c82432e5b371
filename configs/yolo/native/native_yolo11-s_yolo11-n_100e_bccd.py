# YOLO11 s -> n on BCCD, the loss that Ultralytics ships. Both from scratch: nothing is downloaded.
#
#   python tools/dataset_converters/coco2yolo.py --images data/bccd/train --json data/bccd/annotations/train.json \
#       --out data/bccd_yolo --split train
#   python tools/dataset_converters/coco2yolo.py --images data/bccd/val --json data/bccd/annotations/val.json \
#       --out data/bccd_yolo --split val
#   python tools/train.py configs/yolo/teachers/yolo11-s_100e_bccd.py
#   python tools/train.py configs/yolo/native/native_yolo11-s_yolo11-n_100e_bccd.py
#   python tools/test.py configs/yolo/native/native_yolo11-s_yolo11-n_100e_bccd.py \
#       work_dirs/native_yolo11-s_yolo11-n_100e_bccd/weights/best.pt
#
# Score: not measured.
_base_ = '../_base_/bccd_100e.py'

student = 'yolo11n.yaml'
teacher = dict(checkpoint='work_dirs/yolo11-s_100e_bccd/weights/best.pt')
distillers = dict(
    # The three levels that feed the head, where the teacher sees a cell. 6 is Ultralytics' own default (its dis=6).
    native=dict(type='Native', loss_weight=6.0),
)
