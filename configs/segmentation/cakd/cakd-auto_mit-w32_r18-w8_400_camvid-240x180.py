# CamVid on a CPU, a transformer teaches a CNN: as the config beside this one, with a measured loss weight.
#
#   python tools/train.py configs/segmentation/camvid/mit-w32_600_camvid-240x180.py
#   python tools/train.py configs/segmentation/cakd/cakd-auto_mit-w32_r18-w8_400_camvid-240x180.py
_base_ = ['./cakd_mit-w32_r18-w8_400_camvid-240x180.py']
# At weight 1 the relations of values alone are ten times the cross entropy. Here all terms together begin with as much
# gradient at the student's map as the task has there.
model = dict(distillers=dict(cakd=dict(loss_weight=dict(_delete_=True, type='auto', share=1.0))))
