# BCCD on a CPU, masked generation of the teacher's neck. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/mgd/mgd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py
_base_ = ['../nfd/nfd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py']
model = dict(
    distillers=dict(
        _delete_=True,
        neck=dict(type='MGD', taps='neck', reduction='mean', loss_weight=dict(type='auto', share=1.0)),
    )
)
