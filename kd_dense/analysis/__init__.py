"""Measurements of runs: records, paired comparisons, figures."""
