# SegFormer B2 -> B0 on Cityscapes by MMSegmentation's recipe: feature maps and patch embeddings (TransKD-Base).
#
#   mim download mmsegmentation --config segformer_mit-b2_8xb1-160k_cityscapes-1024x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/transkd/transkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py
#   tools/dist_train.sh configs/segmentation/transkd/transkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py 8
#
# MMSegmentation publishes 81.08 mIoU for this teacher, and 76.54 for this student with ImageNet weights. This student
# starts from random weights, as TransKD's do. The distilled score is not measured here.
_base_ = ['../students/segformer_mit-b0-scratch_8xb1-160k_cityscapes-1024x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
        checkpoint='checkpoints/segformer_mit-b2_8x1_1024x1024_160k_cityscapes_20211207_134205-6096669a.pth',
    ),
    distillers=dict(
        # Stage maps after a top-down chain (loss weight 1) and patch embeddings (0.1, 0.1, 0.5 and 1 from the first
        # stage to the last); embedding_weights, feature_weight and levels change that.
        transkd=dict(type='TransKD', variant='base'),
    ),
)
