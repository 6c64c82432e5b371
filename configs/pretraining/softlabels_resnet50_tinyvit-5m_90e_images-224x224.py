# TinyViT-5M pre-trained on what torchvision's ResNet-50 says about a folder of images; the paper's teacher is a CLIP
# ViT-L/14, which any function that builds one can be: teacher=dict(config='module:function', ...).
#
#   name=softlabels_resnet50_tinyvit-5m_90e_images-224x224
#   python tools/cache_teacher.py configs/pretraining/$name.py --views 90 --cache work_dirs/$name/cache
#   tools/dist_train.sh configs/pretraining/$name.py 8 --amp
#
# The soft labels of softlabels_resnet50_mit-b0_90e_images-224x224 do as well: one cache serves any number of students.
# Then, in a config of a segmentor or detector (maps of 64, 128, 160 and 320 channels, strides 4 to 32):
#
#   backbone=dict(_delete_=True, type='kd_dense.TinyViT', arch='5m', init_cfg=dict(
#       type='Pretrained', prefix='backbone.',
#       checkpoint='work_dirs/softlabels_resnet50_tinyvit-5m_90e_images-224x224/epoch_90.pth'))
#
# No score of these settings is measured yet.
_base_ = ['../_base_/images_224.py']

model = dict(
    type='kd_dense.BackbonePretraining',
    # pool_before_norm: as the paper's classifier; leave it out in a segmentor or detector
    student=dict(type='kd_dense.TinyViT', arch='5m', out_indices=(3,), pool_before_norm=True),
    teacher=dict(
        config='torchvision.models:resnet50',
        checkpoint='checkpoints/resnet50-11ad3fa6.pth',
        cache='work_dirs/softlabels_resnet50_tinyvit-5m_90e_images-224x224/cache',
    ),
)
