"""Connectors: modules that bring a student tensor to the teacher's width; trained with the student, then discarded."""

from kd_dense.connectors.align import as_map, match_size
from kd_dense.connectors.conv import Conv1x1, ConvReLUConv, build_connector

__all__ = ['Conv1x1', 'ConvReLUConv', 'as_map', 'build_connector', 'match_size']
