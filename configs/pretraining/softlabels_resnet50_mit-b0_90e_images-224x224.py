# MiT-B0, the backbone of SegFormer-B0, pre-trained on what torchvision's ResNet-50 (80.9 % top-1 on ImageNet) says
# about a folder of images. Its file is that of torchvision.models.ResNet50_Weights.IMAGENET1K_V2.
#
#   name=softlabels_resnet50_mit-b0_90e_images-224x224
#   python tools/cache_teacher.py configs/pretraining/$name.py --views 90 --cache work_dirs/$name/cache
#   tools/dist_train.sh configs/pretraining/$name.py 8 --amp
#
# With 90 views each epoch sees views of its own, as in the paper; for the 1.28 million images of ImageNet the cache
# takes 48 GB. Then, in a config of a segmentor:
#
#   model = dict(backbone=dict(init_cfg=dict(type='Pretrained', prefix='backbone.',
#       checkpoint='work_dirs/softlabels_resnet50_mit-b0_90e_images-224x224/epoch_90.pth')))
#
# No score of these settings is measured yet.
_base_ = ['../_base_/images_224.py']

model = dict(
    type='kd_dense.BackbonePretraining',
    student='mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',  # its backbone and normalisation
    teacher=dict(
        config='torchvision.models:resnet50',
        checkpoint='checkpoints/resnet50-11ad3fa6.pth',
        cache='work_dirs/softlabels_resnet50_mit-b0_90e_images-224x224/cache',
    ),
)
