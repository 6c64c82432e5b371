"""MMDetection's own models at a fraction of their width: every family of dense heads, two-stage models, and masks."""

import pytest
from mmdet.models import dense_heads

from tests.generality.catalog import DETECTORS, UNCOVERED
from tests.generality.sweep import parameters, sweep, uncovered


@pytest.mark.parametrize('entry', parameters(DETECTORS))
def test_one_step(entry):
    sweep('mmdet', entry)


def test_every_dense_head_is_covered():
    assert not uncovered(dense_heads.__all__, DETECTORS, UNCOVERED['mmdet'])
