"""A mean teacher that finds hardly anything any more."""

from kd_dense.adaptation.collapse import CollapseWatch


def test_it_is_said_once():
    watch = CollapseWatch()
    assert [watch(found) for found in (None, 1.0, 4.0, 0.4)] == [None] * 4  # a tenth of the most is left
    assert 'finds 0.3 pseudo labels where it once found 4: it collapses' in watch(0.3)
    assert watch(0.1) is None


def test_a_teacher_that_never_found_anything_does_not_collapse():
    watch = CollapseWatch()
    assert [watch(0.0) for _ in range(3)] == [None] * 3
