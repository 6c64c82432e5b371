"""Where compiling fails, a training goes on, and says so once."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from torch import nn

from kd_dense.compilation import or_uncompiled
from kd_dense.engine.companions import bring_companions
from kd_dense.engine.compile_hook import CompileHook
from kd_dense.errors import ConfigError
from tests.test_execution import Counting


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(net, forward, steps=3):
    """Losses of a few steps, and the weights and statistics behind them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        # the last batch has another size, for which there is another graph
        x = torch.randn(4 + step // 2, 3, generator=torch.Generator().manual_seed(step))
        loss = forward(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, net.state_dict()


@pytest.mark.parametrize('fails_at', [1, 2])
def test_what_fails_runs_as_it_is__with_one_sentence(fails_at):
    torch._dynamo.reset()
    backend, said, net = Counting(fails_at), [], model()
    losses, weights = trained(
        net, torch.compile(net, **or_uncompiled(dict(backend=backend, dynamic=False), said.append))
    )
    expected, wanted = trained(plain := model(), plain)
    assert losses == pytest.approx(expected) and all(torch.allclose(weights[k], wanted[k]) for k in wanted)
    assert backend.graphs == fails_at  # no second attempt
    assert (backend.calls > 0) == (fails_at == 2)  # what was compiled before stays
    assert said == [
        'compile: torch.compile fails (ValueError: this backend), so nothing more is compiled, and the training goes on'
    ]


def test_what_does_not_fail_is_compiled():
    torch._dynamo.reset()
    backend, said, net = Counting(), [], model()
    trained(net, torch.compile(net, **or_uncompiled(dict(backend=backend, dynamic=False), said.append)))
    assert (backend.graphs, backend.calls, said) == (2, 3, [])


@pytest.mark.parametrize(
    ('options', 'handed_on', 'left'),
    [
        (dict(), {}, {}),
        (dict(mode='default', dynamic=True), {}, dict(dynamic=True)),
        (
            dict(mode='max-autotune-no-cudagraphs'),
            dict(config_patches=torch._inductor.list_mode_options('max-autotune-no-cudagraphs')),
            {},
        ),
        (dict(options={'shape-padding': True}), dict(config_patches={'shape_padding': True}), {}),
        (dict(backend='another', mode='fast'), dict(mode='fast'), {}),
        (dict(backend='another', options={'a-b': 1}, fullgraph=True), dict(options={'a-b': 1}), dict(fullgraph=True)),
    ],
)
def test_options_reach_the_backend_as_from_torch(options, handed_on, left, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch._dynamo, 'lookup_backend', lambda name: lambda graph, inputs, **kw: seen.append((name, kw))
    )
    found = or_uncompiled(options, print)
    found.pop('backend')(None, [])
    assert seen == [(options.get('backend', 'inductor'), handed_on)] and found == left


def test_unknown_backend__one_sentence():
    with pytest.raises(
        ConfigError, match=r"compile\.backend: torch has no backend 'inducter'; did you mean 'inductor'"
    ):
        or_uncompiled(dict(backend='inducter'), print)


@pytest.mark.parametrize('asked', [True, dict(backend='eager', dynamic=False)])
@pytest.mark.parametrize('loop', ['before_train', 'before_val', 'before_test'])
def test_config_is_what_it_was_once_mmengine_has_read_it(asked, loop):
    hooks = []
    runner = SimpleNamespace(cfg=Config(dict(compile=asked)), hooks=hooks, register_hook=hooks.append)
    for _ in range(2):
        bring_companions(runner)
        (hook,) = (h for h in hooks if isinstance(h, CompileHook))
        bring_companions(runner)  # as after a run that ended before its loop
        assert callable(runner.cfg.compile.backend)
        assert runner.cfg.compile.get('dynamic') == (None if asked is True else False)
        getattr(hook, loop)(runner)
        assert runner.cfg.compile == asked


@pytest.mark.parametrize('cfg', [dict(), dict(compile=False)])
def test_without_compilation_nothing_happens(cfg):
    hooks = []
    runner = SimpleNamespace(cfg=Config(cfg), hooks=hooks, register_hook=hooks.append)
    bring_companions(runner)
    next(h for h in hooks if isinstance(h, CompileHook)).before_train(runner)
    assert runner.cfg.to_dict() == cfg
