# BCCD on a CPU, box distributions. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
#   python tools/train.py configs/detection/localization_kd/localizationkd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py
_base_ = ['../nfd/nfd_gfl-r18-w32_gfl-r18-w8_6e_bccd.py']
model = dict(
    distillers=dict(
        _delete_=True,
        boxes=dict(type='LocalizationKD', loss_weight=dict(type='auto', share=1.0)),
    )
)
