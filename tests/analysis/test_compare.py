import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from kd_dense.analysis.compare import compare, t_interval
from kd_dense.errors import ConfigError


def test_interval_of_hand_worked_values():
    # mean 2, squared deviations 0 + 1 + 1 + 0.25 + 0.25 = 2.5, std sqrt(2.5 / 4), t(0.975, 4) = 2.776445 (tables)
    half = 2.776445 * math.sqrt(2.5 / 4) / math.sqrt(5)
    interval = t_interval([2.0, 1.0, 3.0, 2.5, 1.5])
    assert interval.low == pytest.approx(2 - half, abs=1e-5)
    assert interval.high == pytest.approx(2 + half, abs=1e-5)
    # Two values: std sqrt(2), standard error 1, t(0.975, 1) = 12.7062
    interval = t_interval([1.0, 3.0])
    assert (interval.low, interval.high) == (pytest.approx(2 - 12.7062, abs=1e-4), pytest.approx(2 + 12.7062, abs=1e-4))


def test_interval_is_that_of_scipys_paired_test():
    generator = np.random.default_rng(0)
    student, distilled = generator.normal(60, 2, 7), generator.normal(61, 2, 7)
    expected = stats.ttest_rel(distilled, student).confidence_interval(0.95)
    interval = t_interval(distilled - student)
    assert (interval.low, interval.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_value_has_no_interval_and_equal_values_have_one_of_width_zero():
    assert t_interval([2.0]) is None
    assert t_interval([]) is None
    interval = t_interval([2.0, 2.0, 2.0])
    assert (interval.low, interval.high) == (2.0, 2.0)


def test_comparison_of_known_runs(runs):
    comparison = compare(runs, teacher=70.0)
    logit, cwd = comparison.variants
    assert comparison.seeds == (0, 1, 2, 3, 4)
    assert comparison.student.mean == pytest.approx(60.0)
    assert comparison.student.std == pytest.approx(math.sqrt(2.5 / 4))
    assert logit.mean == pytest.approx(62.0)
    assert logit.difference.values == pytest.approx((2.0, 1.0, 3.0, 2.5, 1.5))
    assert logit.difference.mean == pytest.approx(2.0)
    assert (logit.difference.won, cwd.difference.won) == (5, 3)
    # The gap is 70 - 60 = 10 points, so shares are tenths of differences.
    assert logit.gap_closed == pytest.approx(0.2)
    assert logit.gap_interval.low == pytest.approx(logit.difference.interval.low / 10)
    assert logit.gap_interval.high == pytest.approx(logit.difference.interval.high / 10)
    assert logit.time_ratio == pytest.approx(1.1)
    assert cwd.time_ratio == pytest.approx(1.25)
    assert (logit.extra_parameters, cwd.extra_parameters) == (0, 12345)


def test_pairs_are_by_seed_and_not_by_position(runs):
    expected = compare(runs).variants[0].difference
    runs['LogitKD'] = runs['LogitKD'][::-1]
    assert compare(runs).variants[0].difference == expected


def test_classes_are_compared_where_every_run_has_a_value(runs):
    for name, shift in (('LogitKD', 4.0), ('CWD', -1.0)):
        for student, distilled in zip(runs['student'], runs[name]):
            distilled.per_class = {'road': student.per_class['road'] + shift, 'pole': math.nan}
    logit, cwd = compare(runs).variants
    assert set(logit.per_class) == {'road'}
    assert logit.per_class['road'].mean == pytest.approx(4.0)
    assert cwd.per_class['road'].mean == pytest.approx(-1.0)


def test_conclusions_claim_what_the_interval_allows(runs):
    better, none, many = compare(runs, teacher=70.0).conclusions()
    assert better == (
        'LogitKD is better by 2.00 mIoU, 95 % interval [1.02, 2.98] over 5 paired seeds; '
        'closes 20 % [10 %, 30 %] of the gap to the teacher.'
    )
    assert none.startswith('CWD: no difference can be claimed, the interval contains 0 (difference +0.10 mIoU')
    assert 'gap' not in none
    assert many.startswith('2 variants were tried')


def test_a_loss_is_called_a_loss(runs, record):
    runs = {
        'student': runs['student'],
        'worse': [record('distilled', r.seed, r.value - 2 - 0.1 * r.seed) for r in runs['student']],
    }
    (sentence,) = compare(runs, teacher=70.0).conclusions()
    # -2.2 +- 2.776445 * sqrt(0.025) / sqrt(5)
    assert sentence == 'worse is worse: difference -2.20 mIoU, 95 % interval [-2.40, -2.00] over 5 paired seeds.'


def test_one_seed_is_no_proof(runs):
    comparison = compare({'student': runs['student'][:1], 'distilled': runs['LogitKD'][:1]}, teacher=70.0)
    (sentence,) = comparison.conclusions()
    assert sentence.startswith(
        'distilled scored 2.00 mIoU higher than the student alone with seed 0; one seed gives no'
    )
    assert 'better' not in sentence
    same = [dataclasses.replace(runs['student'][0], name='distilled')]
    (sentence, _) = compare({'student': runs['student'][:1], 'distilled': same}).conclusions()
    assert sentence.startswith('distilled scored the same as the student alone with seed 0; one seed gives no')
    row = comparison.variants[0]
    assert row.difference.interval is row.gap_interval is row.std is None
    assert row.gap_closed == pytest.approx(0.2)


@pytest.mark.parametrize(('teacher', 'words'), [(55.0, 'is not better than the student alone'), (None, 'is not known')])
def test_without_a_gap_there_is_no_share_of_it(runs, teacher, words):
    comparison = compare(runs, teacher)
    assert all(row.gap_closed is row.gap_interval is None for row in comparison.variants)
    assert words in comparison.conclusions()[-1]
    assert 'of the gap' not in comparison.conclusions()[0]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(iterations=1600), 'iterations 1600, but .* 800'),
        (dict(metric='mAcc'), 'metric mAcc, but .* mIoU'),
        (dict(toolbox='mmdet'), 'toolbox mmdet, but .* mmseg'),
        (dict(parameters=5), 'parameters 5, but .* 3714000'),
        (dict(seed=9), "'LogitKD' has 0, 1, 2, 3, 9"),
        (dict(seed=0), "'LogitKD' has several runs with seed 0"),
        (dict(finished=False), 'seed 4 is not finished'),
        (dict(name='student'), "'LogitKD' should be a distilled or adapted student, but .* is of a run of 'student'"),
    ],
)
def test_runs_that_differ_can_not_be_mixed(runs, record, change, message):
    runs['LogitKD'][-1] = record(**{'name': 'distilled', 'seed': 4, **change})
    with pytest.raises(ConfigError, match=message):
        compare(runs)


def test_both_sides_are_needed(runs):
    with pytest.raises(ConfigError, match='no run of the student alone'):
        compare({'distilled': runs['LogitKD']})
    with pytest.raises(ConfigError, match='no distilled run'):
        compare({'student': runs['student']})
    with pytest.raises(ConfigError, match="'student' has seeds 0, 1, 2, 3, 4 and 'distilled' has 0, 1"):
        compare({'student': runs['student'], 'distilled': runs['LogitKD'][:2]})


def test_an_adaptation_is_compared_with_source_only(adapted):
    """In its own words, of which those of distillation are none; also beside older records that say distilled."""
    (better,) = compare(adapted, teacher=70.0).conclusions()
    assert better == (
        'adapted is better by 2.00 mIoU, 95 % interval [1.02, 2.98] over 5 paired seeds; '
        'closes 20 % [10 %, 30 %] of the gap to the target oracle.'
    )
    adapted['adapted'][0].name = 'distilled'
    comparison = compare(adapted, teacher=55.0)
    assert comparison.gap_sentence() == (
        'The share of the gap closed is n/a: the target oracle (55.00 mIoU) is not better than source only '
        '(60.00 mIoU).'
    )
    one = compare({name: found[1:2] for name, found in adapted.items()})
    said = ' '.join(one.conclusions())
    assert 'adapted scored 1.00 mIoU higher than source only with seed 1' in said
    assert 'the score of the target oracle is not known (give it with --teacher)' in said
    assert not any(word in said for word in ('alone', 'distill', 'the teacher'))
