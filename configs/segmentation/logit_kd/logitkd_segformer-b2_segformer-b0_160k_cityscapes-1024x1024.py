# SegFormer B2 -> B0 on Cityscapes, class predictions.
#
#   mim download mmsegmentation --config segformer_mit-b2_8xb1-160k_cityscapes-1024x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/logit_kd/logitkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py
#   tools/dist_train.sh configs/segmentation/logit_kd/logitkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py 8
#   python tools/test.py configs/segmentation/logit_kd/logitkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py \
#       work_dirs/logitkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024/iter_160000.pth --official-cityscapes
#
# MMSegmentation publishes 81.08 mIoU for this teacher and 76.54 for the student alone. The distilled score is not
# measured here.
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', '../../_base_/runtime.py']

model = dict(
    _delete_=True,
    type='kd_dense.Distillation',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
        checkpoint='checkpoints/segformer_mit-b2_8x1_1024x1024_160k_cityscapes_20211207_134205-6096669a.pth',
    ),
    distillers=dict(
        # A higher temperature shows more of the teacher's second choices. 'auto' sizes the term so that its gradient at
        # the logits is a tenth of that of the cross entropy; a number replaces it.
        logits=dict(type='LogitKD', temperature=4.0, loss_weight=dict(type='auto', share=0.1)),
    ),
)
