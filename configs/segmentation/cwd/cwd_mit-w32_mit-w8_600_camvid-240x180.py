# CamVid on a CPU, transformers: channel-wise divergence of logits. Train the teacher first; numbers: docs/results.md.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/cwd/cwd_mit-w32_mit-w8_600_camvid-240x180.py
_base_ = ['../transkd/transkd_mit-w32_mit-w8_600_camvid-240x180.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # Each class map says where its class is; temperature and weight are those of the paper.
        logits=dict(type='CWD', taps='logits', temperature=4.0, loss_weight=3.0),
    )
)
