"""Adaptation to a target domain without labels: mean teacher, pseudo labels, style transfer."""

from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.pseudo_boxes import (
    PseudoBoxes,
    artificial_box,
    select_boxes,
    warp_boxes,
    warp_pseudo_boxes,
)
from kd_dense.adaptation.pseudo_maps import (
    balanced_class_weights,
    pseudo_label_map,
    sampling_probabilities,
    warp_label_map,
)
from kd_dense.adaptation.statistics import BoxStatistics, MapStatistics
from kd_dense.adaptation.warp import between_views

__all__ = [
    'BoxStatistics',
    'MapStatistics',
    'MeanTeacher',
    'PseudoBoxes',
    'artificial_box',
    'balanced_class_weights',
    'between_views',
    'pseudo_label_map',
    'sampling_probabilities',
    'select_boxes',
    'warp_boxes',
    'warp_label_map',
    'warp_pseudo_boxes',
]
