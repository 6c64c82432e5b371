# DINO Swin-L -> R50 on COCO, matched queries and the encoder's memory.
#
#   mim download mmdet --config dino-5scale_swin-l_8xb2-12e_coco --dest checkpoints
#   python tools/train.py configs/detection/query_kd/querykd_dino-swin-l_dino-r50_12e_coco.py
#
# MMDetection publishes 57.2 AP for this teacher and 49.0 for the student alone. The distilled score is not measured
# here.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
        checkpoint='checkpoints/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth',
    ),
    distillers=dict(
        # 1, 5 and 2 as in the code of DETRDistill. Few of the teacher's 900 queries are objects: the 300 most confident
        # cost a fraction of the assignment. Of the five levels of its memory the student's four are taken, by their
        # stride.
        queries=dict(
            type='QueryKD',
            class_weight=1.0,
            l1_weight=5.0,
            giou_weight=2.0,
            memory_weight=1.0,
            layers='all',
            teacher_queries=300,
            loss_weight=1.0,
        ),
    ),
)
