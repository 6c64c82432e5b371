# SegFormer B2 -> B0 on Cityscapes by the authors' recipe, as far as MMSegmentation expresses it: TransKD-Base.
#
#   python tools/train.py configs/segmentation/teachers/segformer_mit-b2_1xb8-1000e_cityscapes-512x1024.py
#   python tools/train.py configs/segmentation/transkd/transkd_segformer-b2_segformer-b0_1000e_cityscapes-512x1024.py
#
# The authors report 68.58 mIoU, 55.86 for the student alone and 76.49 for the teacher, at a quarter of the resolution
# and with class weights: what MMSegmentation can not express is listed in the config of the student. An independent
# run of their code had 53.40 for the student alone. Our score is not measured.
_base_ = ['../students/segformer_mit-b0-scratch_1xb2-1000e_cityscapes-512x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='configs/segmentation/teachers/segformer_mit-b2_1xb8-1000e_cityscapes-512x1024.py',
        checkpoint='work_dirs/segformer_mit-b2_1xb8-1000e_cityscapes-512x1024/epoch_1000.pth',
    ),
    distillers=dict(
        # Stage maps after a top-down chain (loss weight 1) and patch embeddings (0.1, 0.1, 0.5 and 1 from the first
        # stage to the last); embedding_weights, feature_weight and levels change that.
        transkd=dict(type='TransKD', variant='base'),
    ),
)
