"""Loss weights: how they are written, what they are at which time, and what survives a restart."""

import copy
import math
import pickle

import pytest
import torch

from kd_dense.errors import ConfigError
from kd_dense.loss_weight import LossWeight
from tests.helpers.waits import Waits


def parse(config):
    return LossWeight.parse(config, 'distillers.cwd.loss_weight')


# -- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('config', [2, 2.0, {'value': 2.0}, {'value': 2, 'warmup': 0}])
def test_number(config):
    weight = parse(config)
    assert not weight.needs_calibration
    assert [weight(p) for p in (0.0, 0.3, 1.0)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize('config', ['auto', {'type': 'auto'}, {'value': 'auto'}, {'type': 'auto', 'share': 0.1}])
def test_auto(config):
    weight = parse(config)
    assert weight.needs_calibration and weight.share == 0.1 and weight.is_active(0)
    with pytest.raises(RuntimeError, match='before it was calibrated'):
        weight(0.5)


@pytest.mark.parametrize(
    'config, message',
    [
        (-1, "finite number >= 0 or 'auto', not -1"),
        (math.nan, 'not nan'),
        (math.inf, 'not inf'),
        ('3', "not '3'"),
        ('Auto', "not 'Auto'"),
        ([1.0], r'not \[1.0\]'),
        ({'typ': 'auto'}, "no option 'typ'"),
        ({'type': 'linear'}, "type must be 'auto'"),
        ({'valeu': 1.0}, "no option 'valeu'; did you mean 'value'"),
        ({'type': 'auto', 'share': 0}, 'share must be a finite number > 0, not 0'),
        ({'type': 'auto', 'share': math.nan}, 'share must be'),
        ({'start': 0.5, 'stop': 0.5}, '0 <= start < stop <= 1, not 0.5, 0.5'),
        ({'start': -0.1}, 'start < stop'),
        ({'start': math.nan}, 'start < stop'),
        ({'start': '0.1'}, "start must be a number, not '0.1'"),
        ({'stop': 1.1}, 'start < stop'),
        ({'stop': None}, 'stop must be a number, not None'),
        ({'start': 0.5, 'warmup': 0.6}, 'warmup must lie between 0 and stop - start = 0.5, not 0.6'),
        ({'warmup': -0.1}, 'warmup must'),
        ({'decay': 'cos'}, "decay must be 'linear', 'cosine' or None, not 'cos'"),
        ({'decay': 'linear', 'end': 2}, 'end is a share of the weight, 0..1, not 2'),
        ({'decay': 'linear', 'end': math.nan}, 'end is a share'),
    ],
)
def test_errors_name_the_key(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(config)
    assert str(error.value).startswith('distillers.cwd.loss_weight: ')
    assert '\n' not in str(error.value)


# -- schedule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'config, points',
    [
        # window: inside from start on, outside from stop on
        (dict(start=0.25, stop=0.75), {0: 0, 0.2499: 0, 0.25: 1, 0.5: 1, 0.7499: 1, 0.75: 0, 1: 0}),
        # the end of the training belongs to a window that ends there
        (dict(start=0.25), {0.2: 0, 0.25: 1, 1: 1}),
        # linear warm-up
        (dict(warmup=0.2), {0: 0, 0.05: 0.25, 0.1: 0.5, 0.2: 1, 1: 1}),
        (dict(start=0.2, warmup=0.4), {0.1: 0, 0.2: 0, 0.3: 0.25, 0.5: 0.75, 0.6: 1}),
        # decays
        (dict(decay='linear'), {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        (dict(decay='linear', end=0.2), {0: 1, 0.5: 0.6, 1: 0.2}),
        (dict(decay='cosine'), {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
        (dict(decay='cosine', end=0.5), {0: 1, 0.5: 0.75, 1: 0.5}),
        (dict(decay='linear', stop=0.5), {0: 1, 0.25: 0.5, 0.4: 0.2, 0.5: 0, 1: 0}),
        # all of it: up from 0.2 to 0.4, down to a tenth at 0.8
        (
            dict(start=0.2, warmup=0.2, stop=0.8, decay='linear', end=0.1),
            {0.1: 0, 0.3: 0.5, 0.4: 1, 0.6: 0.55, 0.7999999: 0.1, 0.8: 0},
        ),
        (dict(warmup=1.0, decay='cosine'), {0.5: 0.5}),
    ],
)
def test_schedule(config, points):
    weight = parse({'value': 3.0, **config})
    for progress, expected in points.items():
        assert weight(progress) == pytest.approx(3 * expected, abs=1e-5), progress
        assert weight.is_active(progress) == (expected > 1e-9), progress


def test_zero_is_never_active():
    assert not any(parse(0).is_active(p) for p in (0, 0.5, 1))


def test_reading_a_weight_asks_no_device():
    weight = parse('auto')
    weight.calibrate(0.5)
    with Waits() as waits:
        assert weight(0.5) == 0.5 and weight.is_active(0.5) and not weight.needs_calibration
    assert waits.seen == []


# -- calibrated weights ------------------------------------------------------------------------------------------------


def test_calibrated_weight_follows_the_schedule():
    weight = parse({'type': 'auto', 'decay': 'linear'})
    weight.calibrate(0.3)
    assert weight(0) == 0.3 and weight(0.5) == pytest.approx(0.15)
    assert '0.3' in repr(weight)


def test_calibrated_weight_survives_a_checkpoint_exactly():
    value = 0.1 + 1e-13  # more digits than fp32 has
    first, second = parse('auto'), parse('auto')
    first.calibrate(value)
    second.load_state_dict(first.state_dict())
    assert not second.needs_calibration and second(0.5) == first(0.5) == value
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert other(0.5) == value


def test_a_weight_saved_before_calibration_is_calibrated_after_loading():
    weight = parse('auto')
    weight.calibrate(2.0)
    weight.load_state_dict(parse('auto').state_dict())
    assert weight.needs_calibration


def test_a_number_in_the_config_wins_over_the_checkpoint():
    weight = parse(3.0)
    weight.load_state_dict(parse(2.0).state_dict())
    assert weight(0) == 3.0
    assert weight.state_dict()['value'].item() == 3.0


def test_a_cast_of_the_module_does_not_change_the_weight():
    weight = parse('auto')
    weight.calibrate(1 / 3)
    assert weight.to(torch.bfloat16)(0.5) == 1 / 3
