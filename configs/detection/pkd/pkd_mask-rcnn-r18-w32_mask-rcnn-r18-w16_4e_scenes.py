# Instance segmentation of generated scenes on a CPU: correlation of the features of the neck. Numbers:
# docs/results.md.
#
#   python tools/make_scenes.py --out work_dirs/scenes --train 800 --val 100 --difficulty 0
#   python tools/train.py configs/detection/scenes/mask-rcnn_r18-w32_8e_scenes.py
#   python tools/train.py configs/detection/pkd/pkd_mask-rcnn-r18-w32_mask-rcnn-r18-w16_4e_scenes.py
_base_ = ['../roi_kd/roikd_mask-rcnn-r18-w32_mask-rcnn-r18-w16_4e_scenes.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # At the start with as much gradient at the neck as the task has there.
        neck=dict(type='PKD', taps='neck', loss_weight=dict(type='auto', share=1.0)),
    )
)
