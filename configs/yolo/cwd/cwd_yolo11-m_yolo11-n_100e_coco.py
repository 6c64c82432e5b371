# YOLO11 m -> n on COCO, channel-wise divergence of the levels that feed the head.
#
#   python tools/train.py configs/yolo/cwd/cwd_yolo11-m_yolo11-n_100e_coco.py
#   python tools/test.py configs/yolo/cwd/cwd_yolo11-m_yolo11-n_100e_coco.py \
#       work_dirs/cwd_yolo11-m_yolo11-n_100e_coco/weights/best.pt
#
# Published by Ultralytics without distillation, longer recipe: 39.5 YOLO11n, 51.5 YOLO11m. Distilled: not measured.
_base_ = '../_base_/coco_100e.py'

student = 'yolo11n.yaml'
teacher = dict(checkpoint='checkpoints/yolo11m.pt', config='yolo11m.yaml')
distillers = dict(
    # Where each channel looks, not how strongly it answers: the scale of the teacher's features does not matter.
    # Temperature 1 keeps the few cells that stand out; 4, the paper's choice for logits, spreads the attention.
    # 'auto': calibrated in the first step to a tenth of the gradient that the detection loss has on these levels.
    neck=dict(type='CWD', taps='neck', temperature=1.0, loss_weight=dict(type='auto', share=0.1)),
)
