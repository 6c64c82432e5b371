"""Is a distillation worth starting? What ``tools/doctor.py`` checks, the same for every toolbox.

A toolbox describes itself as a :class:`Toolbox`; :func:`examine` asks it for teacher, student, data and training steps,
and judges what comes back.
"""

from kd_dense.analysis.doctor.examination import examine
from kd_dense.analysis.doctor.report import Check, Report
from kd_dense.analysis.doctor.toolbox import Toolbox

__all__ = ['Check', 'Report', 'Toolbox', 'examine']
