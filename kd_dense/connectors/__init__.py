"""Connectors: modules that bring a student tensor to the teacher's width; trained with the student, then discarded."""

from kd_dense.connectors.align import as_map, match_size
from kd_dense.connectors.conv import Conv1x1, ConvReLUConv, build_connector, joins_levels
from kd_dense.connectors.transkd import CSF, EA, PEA, GLMixer, as_grid, as_tokens

__all__ = [
    'CSF',
    'EA',
    'PEA',
    'Conv1x1',
    'ConvReLUConv',
    'GLMixer',
    'as_grid',
    'as_map',
    'as_tokens',
    'build_connector',
    'joins_levels',
    'match_size',
]
