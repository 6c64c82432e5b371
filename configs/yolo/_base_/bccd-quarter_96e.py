# BCCD for a CPU with the labels of a quarter of the training images, 51 of 205. 96 epochs take about as many steps as
# 24 with all of them. Validation is on all images, as ever.
_base_ = ['./bccd_24e.py']

train = dict(epochs=96, fraction=0.25)
