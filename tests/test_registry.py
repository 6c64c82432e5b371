"""Names in a config: what is unknown ends in one sentence with the closest name."""

import pytest

from kd_dense.connectors import Conv1x1, build_connector
from kd_dense.distillation import Distillers
from kd_dense.distillers import CWD
from kd_dense.errors import ConfigError, closest
from kd_dense.registry import CONNECTORS, DISTILLERS, LOSSES, build, lookup, parameters_of


def fails(function, *parts):
    with pytest.raises(ConfigError) as error:
        function()
    text = str(error.value)
    assert '\n' not in text
    for part in parts:
        assert part in text, text


def test_all_methods_are_registered():
    assert {'LogitKD', 'CWD', 'FeatureMimic', 'NFD', 'Native'} <= set(DISTILLERS.module_dict)
    assert {'mse', 'l1', 'cosine'} <= set(LOSSES.module_dict)
    assert {'Conv1x1', 'ConvReLUConv'} <= set(CONNECTORS.module_dict)


@pytest.mark.parametrize('name', ['CWD', 'kd_dense.CWD'])
def test_build_by_name_and_by_scoped_name(name):
    built = build(DISTILLERS, dict(type=name, temperature=2), 'distillers.cwd')
    assert type(built) is CWD and built.temperature == 2
    assert type(build(DISTILLERS, name, 'distillers.cwd')) is CWD
    assert lookup(DISTILLERS, name, 'x') is CWD


def test_build_leaves_the_config_as_it_was():
    cfg = dict(type='CWD', temperature=2)
    build(DISTILLERS, cfg, 'distillers.cwd')
    assert cfg == dict(type='CWD', temperature=2)


@pytest.mark.parametrize(
    'cfg, parts',
    [
        (dict(type='CWDD'), ("distillers.x: unknown distiller 'CWDD'", "'CWD'")),
        (dict(type='logitkd'), ("unknown distiller 'logitkd'", "did you mean 'LogitKD'")),
        (dict(type='Zebra'), ("unknown distiller 'Zebra'", 'known: ', 'CWD', 'NFD')),
        (dict(temperature=1), ('distillers.x', "needs type='...'", 'CWD', 'LogitKD')),
        (dict(type=3), ('distillers.x', 'must be a name', 'CWD', 'not 3')),
        (dict(type='CWD', temperatur=1), ("distillers.x: CWD has no option 'temperatur'; did you mean 'temperature'",)),
        (dict(type='LogitKD', tap='logits'), ("LogitKD has no option 'tap'; did you mean 'taps'",)),
        (dict(type='FeatureMimic'), ("distillers.x: FeatureMimic needs the option 'taps'",)),
        (
            dict(type='FeatureMimic', taps='neck', loss='mze'),
            ('distillers.x', "unknown loss 'mze'; did you mean 'mse'"),
        ),
        (dict(type='FeatureMimic', taps='neck', loss=None), ('distillers.x', 'loss: must be a name', 'mse')),
        (dict(type='CWD', temperature=0), ('distillers.x: temperature must be a finite number > 0, not 0',)),
        (dict(type='CWD', temperature='4'), ("temperature must be a finite number > 0, not '4'",)),
        (dict(type='NFD', axes='wh'), ("distillers.x: axes must be one of ['hw', 'c', 'chw', 'bhw'], not 'wh'",)),
        (dict(type='CWD', taps=[]), ('distillers.x: taps: needs names', 'not []')),
        (dict(type='CWD', taps=['a', 3]), ('distillers.x: taps: needs names',)),
        (dict(type='CWD', taps=dict(student='a')), ("taps: a dict must have the keys 'student' and 'teacher'",)),
        (dict(type='CWD', loss_weight=-1), ('distillers.x.loss_weight: must be a finite number >= 0',)),
        ('CWD', ('distillers.x: must be a dict',)),
    ],
)
def test_errors_of_a_distiller_config(cfg, parts):
    fails(lambda: Distillers({'x': cfg}), *parts)


@pytest.mark.parametrize('name', ['a b', 'a.b', '', 'keys', '1st'])
def test_names_of_distillers(name):
    fails(lambda: Distillers({name: dict(type='CWD')}), 'can not be used as a name')


@pytest.mark.parametrize('config', [{}, None, [dict(type='CWD')]])
def test_no_distillers(config):
    fails(lambda: Distillers(config), 'distillers: needs at least one entry')


def test_connectors():
    assert type(build_connector('Conv1x1', 3, 4, 'connector')) is Conv1x1
    assert build_connector(dict(type='Conv1x1', bias=False), 3, 4, 'connector').bias is None
    fails(lambda: build_connector('Conv1', 3, 4, 'connector'), "connector: unknown connector 'Conv1'", "'Conv1x1'")
    fails(lambda: build_connector(dict(type='Conv1x1', bais=False), 3, 4, 'connector'), "no option 'bais'", "'bias'")
    # the channels are found by kd_dense and can not be set
    fails(lambda: build_connector(dict(type='Conv1x1', in_channels=3), 3, 4, 'connector'), "no option 'in_channels'")


def test_arguments_are_followed_up_the_bases():
    class A:
        def __init__(self, a, b=1):
            pass

    class B(A):
        def __init__(self, c, *, d=2, **kwargs):
            pass

    class C(B):
        pass

    class D(A):
        def __init__(self, e):
            pass

    assert parameters_of(C) == {'c': True, 'd': False, 'a': True, 'b': False}
    assert parameters_of(D) == {'e': True}
    assert parameters_of(lambda x, y=1: 0) == {'x': True, 'y': False}


def test_closest():
    names = ['neck', 'backbone.layer1', 'backbone.layer2', 'bbox_head']
    assert closest('nek', names) == "did you mean 'neck'?"
    assert closest('backbone.layer3', names).startswith("did you mean 'backbone.layer")
    assert closest('BBOX_HEAD', names) == "did you mean 'bbox_head'?"
    assert closest('xyz', names) == 'known: backbone.layer1, backbone.layer2, bbox_head, neck'
    assert closest('xyz', []) == 'there are none'
    assert closest('xyz', [f'name{i:02}' for i in range(30)]).endswith('name19, ...')
