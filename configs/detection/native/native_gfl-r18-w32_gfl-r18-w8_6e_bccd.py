# BCCD on a CPU, the loss that Ultralytics ships, for GFL. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/native/native_gfl-r18-w32_gfl-r18-w8_6e_bccd.py
_base_ = ['../nfd/nfd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py']
model = dict(
    distillers=dict(
        _delete_=True,
        # The weight is Ultralytics' own default (its dis=6).
        neck=dict(type='Native', taps='neck', loss_weight=6.0),
    )
)
