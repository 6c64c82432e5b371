"""What a training step with distillation costs: what ``tools/benchmark.py`` measures, the same for every toolbox.

A toolbox describes itself as a :class:`Bench`, which turns a config into pieces of :class:`Work`; :func:`benchmark`
times them in turns, on one batch that is made up, and :mod:`~kd_dense.analysis.benchmark.report` writes the table.
"""

from kd_dense.analysis.benchmark.bench import Bench, Facts, Options, Work
from kd_dense.analysis.benchmark.measure import Measured, Row, benchmark
from kd_dense.analysis.benchmark.variants import Variant, read_variant

__all__ = ['Bench', 'Facts', 'Measured', 'Options', 'Row', 'Variant', 'Work', 'benchmark', 'read_variant']
