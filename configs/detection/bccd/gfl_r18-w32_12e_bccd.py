# The teacher on BCCD: GFL on a ResNet-18 of half the usual width, from scratch.
#
#   python tools/train.py configs/detection/bccd/gfl_r18-w32_12e_bccd.py
_base_ = ['../../_base_/gfl_r18-w32.py', '../../_base_/bccd.py']
