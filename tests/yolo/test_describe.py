"""Where things are in Ultralytics' models, and how far a teacher runs."""

from collections import Counter

import pytest
import torch
from ultralytics.nn.tasks import ClassificationModel, RTDETRDetectionModel

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.taps import Taps
from kd_dense.yolo.describe import describe, forward_for
from tests.yolo.helpers import FAMILIES, build


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('task', ['', '-seg'])
def test_aliases_are_what_their_names_say(family, task):
    model = build(family, task=task).eval()
    description = describe(model)
    taps = Taps(model, ['backbone', 'neck', 'logits', 'branch_logits'], description.aliases)
    with torch.no_grad(), taps.record():
        height, width = description.run()
    values = taps.take()
    for alias in ('backbone', 'neck', 'logits'):
        assert [height / v.shape[2] for v in values[alias]] == [8, 16, 32], alias
        assert [width / v.shape[3] for v in values[alias]] == [8, 16, 32], alias
    assert [v.shape[1] for v in values['neck']] == [m[0].conv.in_channels for m in model.model[-1].cv2]
    assert {v.shape[1] for v in values['branch_logits']} == {2}
    assert len(values['branch_logits']) == (6 if family == 'yolo26' else 3)
    assert description.logits.num_classes == 2
    assert description.logits.classes == ('disc', 'square')
    assert ('logits_one2one' in description.aliases) == (family == 'yolo26')


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_are_the_scores_of_the_head(family):
    model = build(family).eval()
    images = torch.rand(2, 3, 64, 96)
    taps = Taps(model, ['branch_logits'], describe(model).aliases)
    with torch.no_grad(), taps.record():
        _, raw = model(images)
    tapped = torch.cat([v.flatten(2) for v in taps.take()['branch_logits']], 2)
    branches = [raw['one2many'], raw['one2one']] if 'one2many' in raw else [raw]
    assert torch.equal(tapped, torch.cat([b['scores'] for b in branches], 2))


def test_dry_forward_has_the_channels_of_the_model():
    model = build('yolo11', channels=5).eval()
    assert describe(model).run() == (64, 64)


def test_heads_without_class_logits_say_so():
    model = RTDETRDetectionModel('rtdetr-resnet50.yaml', nc=2, verbose=False)
    description = describe(model)
    assert 'RTDETRDecoder' in description.logits
    assert len(description.aliases['neck']) == 3
    with pytest.raises(ConfigError, match=r"distillers\.kd: the student has no tap 'logits'.*RTDETRDecoder"):
        Distillers({'kd': {'type': 'LogitKD'}}).setup(description, description)
    with pytest.raises(ConfigError, match="student has no tap 'query_logits': Ultralytics trains RT-DETR by a trainer"):
        Distillers({'kd': {'type': 'QueryKD'}}).setup(description, description)
    plain = describe(build('yolo11'))
    with pytest.raises(ConfigError, match="student has no tap 'query_logits': it predicts no set of objects"):
        Distillers({'kd': {'type': 'QueryKD'}}).setup(plain, plain)
    assert 'Classify' in describe(ClassificationModel('yolo11n-cls.yaml', nc=2, verbose=False)).logits


def test_a_model_that_is_not_from_ultralytics_is_refused():
    with pytest.raises(ConfigError, match='Linear is not an Ultralytics model'):
        describe(torch.nn.Linear(1, 1))


def count_calls(model, names, images):
    """Path -> how often it ran in a forward for the taps ``names``, after the forward that counts them."""
    taps = Taps(model, names, describe(model).aliases)
    forward = forward_for(model, taps)
    calls = Counter()
    handles = [m.register_forward_hook(lambda *_, p=p: calls.update([p])) for p, m in model.named_modules()]
    with torch.no_grad():
        for _ in range(2):
            calls.clear()
            taps.run_until_deepest(lambda: forward(images), images.shape[0])
            values = taps.take()
    for handle in handles:
        handle.remove()
    assert 'forward' not in model.model[-1].__dict__
    return calls, values


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('task', ['', '-seg'])
def test_only_the_tapped_branches_of_the_head_run(family, task):
    model = build(family, task=task).eval()
    images = torch.rand(2, 3, 64, 64)
    head = len(model.model) - 1
    calls, values = count_calls(model, ['neck', 'branch_logits'], images)
    ran = {path.split('.')[2] for path in calls if path.startswith(f'model.{head}.')}
    assert ran == ({'cv3', 'one2one_cv3'} if family == 'yolo26' else {'cv3'})
    whole = Taps(model, ['neck', 'branch_logits'], describe(model).aliases)
    with torch.no_grad(), whole.record():
        model(images)
    for name, tensors in whole.take().items():
        assert all(torch.equal(a, b) for a, b in zip(values[name], tensors, strict=True)), name


def test_nothing_runs_behind_the_deepest_tap():
    model = build('yolo11').eval()
    calls, _ = count_calls(model, ['backbone:1'], torch.rand(1, 3, 64, 64))
    assert {int(p.split('.')[1]) for p in calls if p.startswith('model.')} == set(range(7))


@pytest.mark.parametrize('name', ['model.23', 'model.23.dfl'])
def test_the_whole_head_runs_when_it_is_tapped(name):
    model = build('yolo11').eval()
    taps = Taps(model, [name])
    assert forward_for(model, taps) is model
