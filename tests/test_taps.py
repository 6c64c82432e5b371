"""Taps see what a model computed, as it was when computed, and leave nothing behind."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kd_dense.errors import ConfigError, DistillationError
from kd_dense.taps import Taps


class BasicBlock(nn.Module):
    """As in torchvision and MMDetection: in-place ReLU after the norms, in-place addition of the shortcut."""

    def __init__(self, width: int, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.relu.inplace:
            out += x
        else:
            out = out + x
        return self.relu(out)


class Net(nn.Module):
    """Stem, two blocks, a head that is shared by two levels and called by its ``forward``."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList([BasicBlock(4, inplace), BasicBlock(4, inplace)])
        self.neck = Neck()
        self.head = nn.Conv2d(4, 2, 1)
        self.calls = 0

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        levels = self.neck(x)
        self.calls += 1
        return [self.head.forward(level) for level in levels]


class Neck(nn.Module):
    def forward(self, x):
        return x * 2, x[:, :, ::2, ::2] * 3


class Returns(nn.Module):
    """Returns whatever it was given."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


class Holder(nn.Module):
    def __init__(self, value) -> None:
        super().__init__()
        self.inner = Returns(value)

    def forward(self):
        return self.inner()


def captured(model, *names, inputs=None, **kwargs):
    taps = Taps(model, names, **kwargs)
    with taps.record():
        model(*inputs) if inputs is not None else model()
        return taps.take()


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


# -- names -------------------------------------------------------------------------------------------------------------


def test_path_index_and_shared_module(images):
    net = Net()
    values = captured(net, 'stem', 'neck', 'neck:1', 'neck:-1', 'head', 'layers.0.bn1', inputs=[images])
    torch.testing.assert_close(values['stem'][0], nn.functional.conv2d(images, net.stem.weight, net.stem.bias))
    assert [tuple(x.shape) for x in values['neck']] == [(2, 4, 8, 8), (2, 4, 4, 4)]
    assert values['neck:1'][0] is values['neck'][1] is values['neck:-1'][0]
    # the head ran once for each level, by a direct call of its forward, and both outputs are there in order
    assert [tuple(x.shape) for x in values['head']] == [(2, 2, 8, 8), (2, 2, 4, 4)]
    for out, level in zip(values['head'], values['neck'], strict=True):
        torch.testing.assert_close(out, nn.functional.conv2d(level, net.head.weight, net.head.bias))


def test_aliases(images):
    net = Net()
    aliases = {'backbone': ['layers.0', 'layers.1'], 'logits': ['head'], 'pyramid': ['neck:0', 'layers.1']}
    values = captured(
        net, 'backbone', 'backbone:1', 'backbone:-2', 'logits', 'pyramid', 'pyramid:0', inputs=[images], aliases=aliases
    )
    assert len(values['backbone']) == 2 and len(values['logits']) == 2
    assert values['backbone:1'][0] is values['backbone'][1]
    assert values['backbone:-2'][0] is values['backbone'][0]
    assert values['pyramid'][1] is values['backbone'][1]
    torch.testing.assert_close(values['pyramid:0'][0], 2 * values['backbone'][1])


def test_alias_hides_a_module_of_the_same_name(images):
    values = captured(Net(), 'neck', inputs=[images], aliases={'neck': ['stem', 'layers.0', 'layers.1']})
    assert len(values['neck']) == 3


def test_keys_into_dicts_lists_and_stacked_tensors():
    stacked = torch.arange(24.0).reshape(2, 3, 4)
    model = Holder({'one2many': {'scores': [torch.zeros(1), torch.ones(1)]}, 'stacked': stacked})
    values = captured(model, 'inner:one2many:scores', 'inner:one2many:scores:1', 'inner:stacked:-1')
    assert [x.item() for x in values['inner:one2many:scores']] == [0, 1]
    assert values['inner:one2many:scores:1'][0].item() == 1
    assert torch.equal(values['inner:stacked:-1'][0], stacked[-1])
    values = captured(model, 'out:1:scores:0', aliases={'out': ['inner:stacked', 'inner:one2many']})
    assert values['out:1:scores:0'][0].item() == 0


@pytest.mark.parametrize(
    'name, message',
    [
        ('layers.0.bn3', r"no module 'layers.0.bn3'; did you mean .*'layers.0.bn[12]'"),
        ('Neck', "did you mean 'neck'"),
        ('logitz', "did you mean 'logits'"),
        ('logits:2', r"'logits' has the members 0\.\.0, not '2'"),
        ('logits:--1', r"'logits' has the members 0\.\.0, not '--1'"),
        ('broken', "no module 'heat'; did you mean 'head'"),
        ('', "no module ''"),
    ],
)
def test_unknown_names_end_in_the_closest(name, message):
    aliases = {'logits': ['head'], 'broken': ['heat:0']}
    with pytest.raises(ConfigError, match=message) as error:
        Taps(Net(), [name], aliases, key='distillers.cwd.taps')
    assert str(error.value).startswith('distillers.cwd.taps: ')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'value, name, message',
    [
        ({'scores': torch.ones(1), 'boxes': torch.ones(1)}, 'inner', r"is a dict; choose .*'scores', 'boxes'"),
        ({'scores': torch.ones(1)}, 'inner:score', "the output has no 'score'; it is a dict of .*'scores'"),
        ([torch.ones(1)], 'inner:3', "the output has no '3'; it is a list of 1 items"),
        ([torch.ones(1)], 'inner:first', "the output has no 'first'"),
        (torch.ones(2, 2), 'inner:2', "the output has no '2'"),
        (3.5, 'inner', 'gives no tensor but float'),
        ([], 'inner', 'gives no tensor but list'),
        (None, 'inner:0', "the output has no '0'"),
    ],
)
def test_outputs_that_do_not_fit_the_name(value, name, message):
    model = Holder(value)
    with pytest.raises(ConfigError, match=message):
        captured(model, name)
    assert 'forward' not in model.inner.__dict__


def test_a_tap_that_does_not_run(images):
    net = Net()
    net.unused = nn.ReLU()
    with pytest.raises(DistillationError, match="'unused' did not run"):
        captured(net, 'stem', 'unused', inputs=[images])


def test_a_module_with_two_names_can_be_tapped_by_both(images):
    net = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 3, 1), b=nn.ReLU()))
    net.c = net.a
    values = captured(net, 'a', 'c', inputs=[images])  # runs twice: as a and, the last child, as c
    assert len(values['a']) == len(values['c']) == 2
    assert all(x is y for x, y in zip(values['a'], values['c'], strict=True))
    assert 'forward' not in net.a.__dict__


def test_containers_are_copied_when_captured():
    """A list that the model goes on to change (Ultralytics reuses one) stays as it was."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Returns([torch.zeros(1)])

        def forward(self):
            out = self.inner()
            out[0] = torch.ones(1)
            out.append(torch.ones(1))

    assert [x.item() for x in captured(Model(), 'inner')['inner']] == [0]


def test_the_model_gets_its_own_output_back():
    pair = namedtuple('pair', 'a b')(torch.zeros(1), torch.ones(1))
    model = Holder(pair)
    taps = Taps(model, ['inner'])
    with taps.record():
        assert model() is pair
        assert [x.item() for x in taps.take()['inner']] == [0, 1]


# -- values that are overwritten ---------------------------------------------------------------------------------------

NAMES = [f'layers.{i}.{m}' for i in range(2) for m in ('conv1', 'bn1', 'bn2', 'relu')] + [
    'layers.0',
    'layers.1',
    'stem',
]


@pytest.mark.parametrize('step', [1, 3])
def test_overwritten_values_and_gradients_equal_those_of_a_model_without_inplace(step, images):
    inplace, plain = Net(inplace=True), Net(inplace=False)
    plain.load_state_dict(inplace.state_dict())
    results = []
    for net in (inplace, plain):
        taps = Taps(net, NAMES)
        for _ in range(step):  # the first recording clones everything; later ones only what has to be
            net.zero_grad()
            with taps.record():
                out = net(images)
                values = taps.take()
            loss = sum(o.square().mean() for o in out)
            for i, name in enumerate(NAMES):
                loss = loss + sum(((i + 1) * v.sin()).mean() for v in values[name])
            loss.backward()
        results.append((values, [p.grad for p in net.parameters()]))
    for name in NAMES:
        # ReLU runs twice in a block
        assert len(results[0][0][name]) == (2 if name.endswith('relu') else 1)
        for a, b in zip(results[0][0][name], results[1][0][name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_values_before_the_inplace_operation_are_kept():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True))
    nn.init.constant_(net[0].weight, -1)
    nn.init.zeros_(net[0].bias)
    values = captured(net, '0', '1', inputs=[torch.tensor([[[[2.0, -3.0]]]])])
    assert values['0'][0].tolist() == [[[[-2.0, 3.0]]]]
    assert values['1'][0].tolist() == [[[[0.0, 3.0]]]]


def test_no_clone_is_made_or_given_where_nothing_is_overwritten(images, monkeypatch):
    net = Net()
    made = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, 'clone', lambda self: made.append(self) or clone(self))
    names = ['stem', 'layers.0.bn1', 'layers.1', 'neck']
    taps = Taps(net, names)
    for step in range(3):
        made.clear()
        produced = []
        handle = net.stem.register_forward_hook(lambda m, i, o, into=produced: into.append(o))
        with taps.record():
            net(images)
            values = taps.take()
        handle.remove()
        assert values['stem'][0] is produced[0]
        assert len(made) == (5 if step == 0 else 1)  # later only the norm before the in-place ReLU; the neck gives two


def test_a_value_that_begins_to_be_overwritten_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()
            self.change = False

        def forward(self, x):
            y = self.inner(x * 1)
            return y.add_(1) if self.change else y + 1

    model = Model()
    taps = Taps(model, ['inner'])
    for change, message in (
        (False, None),
        (True, "'inner' was overwritten in place in this forward but not in the first"),
    ):
        model.change = change
        with taps.record():
            model(torch.zeros(1))
            if message is None:
                taps.take()
            else:
                with pytest.raises(DistillationError, match=message):
                    taps.take()
    with taps.record():  # from then on it is cloned
        model(torch.zeros(1))
        assert taps.take()['inner'][0].item() == 0


def test_works_without_gradients_and_in_inference_mode(images):
    net = Net().eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            values = captured(net, 'stem', 'neck', inputs=[images])
        assert len(values['neck']) == 2 and not values['stem'][0].requires_grad


# -- nothing stays -----------------------------------------------------------------------------------------------------


def test_nothing_stays_on_the_model(images):
    net = Net()
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    taps = Taps(net, NAMES)
    with taps.record():
        net(images)
        taps.take()
    before['']['calls'] = 1
    for name, module in net.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert all(module.__dict__[k] is before[name][k] for k in module.__dict__), name


def test_nothing_stays_after_an_exception(images):
    net = Net()
    taps = Taps(net, ['stem', 'layers.0', 'head'])
    recorded = []
    net.stem.register_forward_hook(lambda m, i, o: recorded.append(weakref.ref(o)))
    net.layers[1].register_forward_pre_hook(lambda m, i: 1 / 0)
    with pytest.raises(ZeroDivisionError), taps.record():
        net(images)
    assert not any('forward' in m.__dict__ for m in net.modules())
    with pytest.raises(ZeroDivisionError):
        taps.run_until_deepest(lambda: net(images))
    assert not any('forward' in m.__dict__ for m in net.modules())
    gc.collect()
    assert [r() for r in recorded] == [None, None]  # the tensors were let go
    net.layers[1]._forward_pre_hooks.clear()
    with taps.record():  # and the taps still work
        net(images)
        assert len(taps.take()['head']) == 2


def test_the_values_live_no_longer_than_the_reader_holds_them(images):
    net = Net()
    taps = Taps(net, ['layers.0', 'layers.0.bn1'])
    with torch.no_grad():
        for _ in range(2):
            with taps.record():
                net(images)
            values = taps.take()
            alive = [weakref.ref(v[0]) for v in values.values()]
            values.clear()
            assert [r() for r in alive] == [None, None]


def test_can_not_be_recorded_twice_at_once(images):
    taps = Taps(Net(), ['stem'])
    with taps.record(), pytest.raises(RuntimeError, match='twice'), taps.record():
        pass


def test_an_instance_level_forward_comes_back(images):
    """Fused layers, and layers patched by a toolbox, carry a forward of their own."""
    net = Net()
    own = net.stem.forward

    def patched(x):
        return own(x) + 1

    net.stem.forward = patched
    plain = captured(net, 'stem', inputs=[images])['stem'][0]
    torch.testing.assert_close(plain, own(images) + 1)
    assert net.stem.__dict__['forward'] is patched


def test_nested_recordings_of_two_taps_objects(images):
    """Student and teacher may share modules (self-distillation)."""
    net = Net()
    first, second = Taps(net, ['stem', 'head']), Taps(net, ['head'])
    with first.record(), second.record():
        net(images)
    a, b = first.take(), second.take()
    assert len(a['head']) == len(b['head']) == 2 and a['head'][0] is b['head'][0]
    assert not any('forward' in m.__dict__ for m in net.modules())


def test_model_can_be_pickled_and_copied_before_and_after(images):
    net = Net().eval()
    taps = Taps(net, ['layers.0', 'head'])
    for _ in range(2):
        for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            values = captured(other, 'layers.0', 'head', inputs=[images])
            torch.testing.assert_close(values['head'][0], other(images)[0])
        with taps.record():
            out = net(images)
            assert taps.take()['head'][0] is out[0]


# -- stopping at the deepest -------------------------------------------------------------------------------------------


def count_calls(model):
    calls = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, name=name: calls.append(name))
    return calls


def test_run_until_deepest_stops(images):
    net = Net().eval()
    calls = count_calls(net)
    taps = Taps(net, ['stem', 'layers.0'])
    with torch.no_grad():
        taps.run_until_deepest(lambda: net(images), key=2)  # counts
        whole = taps.take()
        assert 'layers.1.conv1' in calls and net.calls == 1
        calls.clear()
        taps.run_until_deepest(lambda: net(images), key=2)
        part = taps.take()
    assert [c for c in calls if c.startswith('layers.1') or c == 'neck'] == []
    assert 'layers.0.bn2' in calls and net.calls == 1
    for name in whole:
        torch.testing.assert_close(part[name][0], whole[name][0], rtol=0, atol=0)
    assert not any('forward' in m.__dict__ for m in net.modules())


def test_run_until_deepest_waits_for_all_calls_of_a_shared_module(images):
    net = Net().eval()
    taps = Taps(net, ['head'])
    for _ in range(3):
        taps.run_until_deepest(lambda: net(images))
        assert [tuple(x.shape) for x in taps.take()['head']] == [(2, 2, 8, 8), (2, 2, 4, 4)]


def test_run_until_deepest_counts_anew_for_every_key():
    net = nn.Sequential(nn.Identity(), nn.Identity())
    taps = Taps(net, ['0'])

    def forward(times):
        for _ in range(times):
            net[0](torch.ones(1))
        net[1](torch.ones(1))

    for key in (1, 3, 1, 3):
        taps.run_until_deepest(lambda times=key: forward(times), key=key)
        assert len(taps.take()['0']) == key


@pytest.mark.parametrize('now', [(1, 1), (1, 2), (3, 0), (0, 3), (2, 0)])
def test_run_until_deepest_with_other_numbers_of_calls(now):
    a, b = nn.Identity(), nn.Identity()
    net = nn.ModuleList([a, b])
    taps = Taps(net, ['0', '1'])

    def forward(times_a, times_b):
        for module, times in ((a, times_a), (b, times_b)):
            for _ in range(times):
                module(torch.ones(1))

    taps.run_until_deepest(lambda: forward(2, 1))
    taps.take()
    with pytest.raises(DistillationError, match='runs equally often in every forward'):
        taps.run_until_deepest(lambda: forward(*now))
    taps.run_until_deepest(lambda: forward(2, 1))
    assert [len(v) for v in taps.take().values()] == [2, 1]


def test_stop_is_not_swallowed_by_the_model(images):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()
            self.later = 0

        def forward(self, x):
            try:
                x = self.inner(x)
            except Exception:
                x = x * 0
            self.later += 1
            return x

    model = Careful()
    taps = Taps(model, ['inner'])
    for _ in range(3):
        taps.run_until_deepest(lambda: model(images))
        assert torch.equal(taps.take()['inner'][0], images)
    assert model.later == 1


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_distributed_wrapper(images, tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = Net()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        taps = {'plain': Taps(net, ['layers.0.bn1', 'head']), 'wrapped': Taps(wrapped.module, ['layers.0.bn1', 'head'])}
        values = {}
        for name, model in (('plain', net), ('wrapped', wrapped)):
            for _ in range(2):
                with taps[name].record():
                    model(images)
                    values[name] = taps[name].take()
                model.zero_grad()
                sum(v.square().mean() for vs in values[name].values() for v in vs).backward()
        for name in values['plain']:
            torch.testing.assert_close(values['plain'][name], values['wrapped'][name])
        for p, q in zip(net.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore:Dynamo does not know how to trace')
def test_compiled_model_gives_the_same_and_is_not_compiled_again_and_again(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    other = copy.deepcopy(net)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(other, backend=backend)
    counts = []
    sides = [(model, Taps(plain, ['1', '3'])) for model, plain in ((net, net), (compiled, other))]
    for _ in range(4):
        x = torch.randn_like(images)
        for model, taps in sides:
            model.zero_grad()
            with taps.record():
                model(x)
                values = taps.take()
            sum(v.square().mean() for vs in values.values() for v in vs).backward()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[-1] == counts[-2]
    torch._dynamo.reset()
