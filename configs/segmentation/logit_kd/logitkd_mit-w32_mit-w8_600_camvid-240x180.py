# CamVid on a CPU, transformers: class predictions. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/logit_kd/logitkd_mit-w32_mit-w8_600_camvid-240x180.py
_base_ = ['../transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # Temperature 1: at 2, the same with ResNets lost a class, see docs/results.md.
        logits=dict(type='LogitKD', temperature=1.0, loss_weight=1.0),
    )
)
