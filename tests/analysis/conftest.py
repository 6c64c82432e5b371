"""Records as runs leave them, with numbers that are easy to compute with by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kd_dense.analysis.record import RunRecord


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    def make(name: str = 'student', seed: int = 0, value: float = 60.0, **changes) -> RunRecord:
        fields = dict(
            toolbox='mmseg',
            metric='mIoU',
            iterations=800,
            seconds=100.0,
            parameters=3714000,
            curve=[(400, value - 10), (800, value)],
            per_class={'road': value + 5, 'pole': value - 5},
        )
        return RunRecord(name=name, seed=seed, value=value, **{**fields, **changes})

    return make


@pytest.fixture
def runs(record) -> dict[str, list[RunRecord]]:
    """Five seeds; the differences of LogitKD are 2, 1, 3, 2.5, 1.5 and those of CWD are 1, -1, 1, -1, 0.5."""
    student = [60.0, 61.0, 59.0, 60.5, 59.5]
    logit = [2.0, 1.0, 3.0, 2.5, 1.5]
    cwd = [1.0, -1.0, 1.0, -1.0, 0.5]
    return {
        'student': [record(seed=s, value=v) for s, v in enumerate(student)],
        'LogitKD': [record('distilled', s, v + d, seconds=110.0) for s, (v, d) in enumerate(zip(student, logit))],
        'CWD': [
            record('distilled', s, v + d, seconds=125.0, extra_parameters=12345)
            for s, (v, d) in enumerate(zip(student, cwd))
        ],
    }


@pytest.fixture
def adapted(runs) -> dict[str, list[RunRecord]]:
    """The runs of LogitKD as those of an adaptation."""
    return {'student': runs['student'], 'adapted': [replace(run, name='adapted') for run in runs['LogitKD']]}
