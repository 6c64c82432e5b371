"""The plain student of a run as a file to deploy, written only if its outputs equal the student's."""

from kd_dense.export.options import FORMATS, ExportOptions
from kd_dense.export.report import Report, Row
from kd_dense.export.run import export, export_any

__all__ = ['FORMATS', 'ExportOptions', 'Report', 'Row', 'export', 'export_any']
