"""MMSegmentation's own models at a fraction of their width: every decode head, and backbones."""

import pytest
from mmseg.models import decode_heads

from tests.generality.catalog import SEGMENTORS, UNCOVERED
from tests.generality.sweep import parameters, sweep, uncovered


@pytest.mark.parametrize('entry', parameters(SEGMENTORS))
def test_one_step(entry):
    sweep('mmseg', entry)


def test_every_decode_head_is_covered():
    assert not uncovered(decode_heads.__all__, SEGMENTORS, UNCOVERED['mmseg'])
