# CamVid on a CPU, transformers: normalised features. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/nfd/nfd_mit-w32_mit-w8_600_camvid-240x180.py
_base_ = ['../transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # The joined features before the classifier.
        head=dict(type='NFD', taps='decode_head.fusion_conv', loss_weight=2.0),
    )
)
