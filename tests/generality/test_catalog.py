"""The page about supported models says what the sweep checks."""

from tests.generality.catalog import DETECTORS, PAGE, SEGMENTORS, page


def test_page__is_up_to_date():
    assert PAGE.read_text() == page(), 'run python -m tests.generality.catalog'


def test_names__are_there_once():
    for models in (SEGMENTORS, DETECTORS):
        names = [model.name for model in models]
        assert len(set(names)) == len(names)
