# BCCD on a CPU, the teacher's features as prior knowledge. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/dpk/dpk_gfl-r18-w32_gfl-r18-w8_6e_bccd.py
_base_ = ['../nfd/nfd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # As wide as the teacher's neck; half of that does as well (docs/results.md).
        neck=dict(type='DPK', taps='neck', width=64, heads=4, loss_weight=dict(type='auto', share=1.0)),
    )
)
