# SegFormer B2 -> B0 on Cityscapes by MMSegmentation's recipe: TransKD-EA, an embedding assistant for every stage.
#
#   mim download mmsegmentation --config segformer_mit-b2_8xb1-160k_cityscapes-1024x1024 --dest checkpoints
#   python tools/train.py configs/segmentation/transkd/transkd-ea_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py
#   tools/dist_train.sh configs/segmentation/transkd/transkd-ea_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py 8
#
# MMSegmentation publishes 81.08 mIoU for this teacher, and 76.54 for this student with ImageNet weights. This student
# starts from random weights, as TransKD's do. The distilled score is not measured here.
_base_ = ['./transkd_segformer-b2_segformer-b0_160k_cityscapes-1024x1024.py']
model = dict(distillers=dict(transkd=dict(variant='ea')))
