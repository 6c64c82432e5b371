# The teacher of the configs with a quarter of the labels of BCCD: twice as long as c2f-w16_24e_bccd.py.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_48e_bccd.py
_base_ = './c2f-w16_24e_bccd.py'

train = dict(epochs=48)
