"""Data: generated scenes in three layouts, datasets for MMSegmentation, and a COCO to YOLO converter.

Import the modules directly; :mod:`kd_dense.data.datasets` needs MMSegmentation, the others do not.
"""
