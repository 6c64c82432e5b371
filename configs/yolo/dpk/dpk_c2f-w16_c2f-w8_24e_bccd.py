# BCCD on a CPU, the teacher's features as prior knowledge. Train the teacher first; the numbers are in docs/results.md.
#
#   python tools/train.py configs/yolo/teachers/c2f-w16_24e_bccd.py
#   python tools/train.py configs/yolo/dpk/dpk_c2f-w16_c2f-w8_24e_bccd.py
_base_ = '../_base_/bccd_24e.py'

teacher = dict(checkpoint='work_dirs/c2f-w16_24e_bccd/weights/last.pt')
distillers = dict(
    # As wide as the coarsest level of the teacher; the default of 128 is for wider pyramids.
    neck=dict(type='DPK', taps='neck', width=64, heads=4, loss_weight=dict(type='auto', share=1.0)),
)
