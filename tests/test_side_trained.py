"""A module trained on its own: invisible to the host, moved, saved and resumed with its owner."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kd_dense.errors import ConfigError
from kd_dense.side_trained import SideTrained

SGD = dict(type='SGD', momentum=0.9)


class Owner(nn.Module):
    def __init__(self, optimizer=SGD):
        super().__init__()
        torch.manual_seed(0)
        self.connector = nn.Linear(3, 3)
        self.judge = SideTrained(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), optimizer)


def step(owner, seed, lr=0.1):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=next(owner.parameters()).dtype)
    return owner.judge.step(lambda d: (d(x) - 1).square().mean(), lr)


def test_steps_equal_those_of_a_plain_module():
    owner = Owner()
    plain = copy.deepcopy(owner.judge.module).requires_grad_(True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        value = step(owner, seed, lr=0.1 / (seed + 1))
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        loss = (plain(x) - 1).square().mean()
        optimizer.param_groups[0]['lr'] = 0.1 / (seed + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert value.item() == loss.item() and not value.requires_grad
    for own, other in zip(owner.judge.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other) and own.grad is None and not own.requires_grad


def test_the_host_does_not_see_it():
    owner = Owner()
    assert [n for n, _ in owner.named_parameters()] == ['connector.weight', 'connector.bias']
    assert not list(owner.judge.children()) and not list(owner.buffers())
    owner.eval()
    assert owner.judge.module.training
    owner.requires_grad_(True)
    assert not any(p.requires_grad for p in owner.judge.module.parameters())


def test_a_call_gives_a_gradient_to_its_inputs_only_even_after_a_step():
    owner = Owner()
    x = torch.randn(4, 3, requires_grad=True)
    owner.judge(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in owner.judge.module.parameters())
    step(owner, 0)
    x.grad = None
    owner.judge(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in owner.judge.module.parameters())


def test_a_step_leaves_everything_else_alone():
    owner = Owner()
    hidden = owner.connector(torch.randn(4, 3))
    owner.judge.step(lambda d: d(hidden.detach()).mean(), 0.1)
    assert all(p.grad is None for p in owner.parameters())


def test_works_where_gradients_are_off():
    owner = Owner()
    before = [p.clone() for p in owner.judge.module.parameters()]
    with torch.no_grad():
        step(owner, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, owner.judge.module.parameters(), strict=True))


@pytest.mark.parametrize('optimizer', [SGD, dict(type='Adam'), dict(type='AdamW', weight_decay=0.1)])
def test_state_dict_resumes_bit_for_bit(optimizer):
    run, resumed = Owner(optimizer), Owner(optimizer)
    for seed in range(3):
        step(run, seed)
    state = {k: v.cpu().clone() for k, v in run.state_dict().items()}
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert any('optimizer.' in k for k in state) and 'judge.module.1.running_mean' in state
    step(resumed, 9)  # what it did before is forgotten
    resumed.load_state_dict(state)
    for seed in range(3, 6):
        assert torch.equal(step(run, seed), step(resumed, seed))
    a, b = run.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_state_before_the_first_step_has_no_optimizer():
    run, fresh = Owner(), Owner()
    assert not any('optimizer' in k for k in run.state_dict())
    step(run, 0)
    run.load_state_dict(fresh.state_dict())
    assert torch.equal(step(run, 1), step(fresh, 1))
    assert torch.equal(run.judge.module[0].weight, fresh.judge.module[0].weight)


def test_loading_its_own_state_changes_nothing():
    run, reference = Owner(), Owner()
    for owner in (run, reference):
        step(owner, 0)
    run.load_state_dict(run.state_dict(), strict=True)
    assert torch.equal(step(run, 1), step(reference, 1))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('judge.module.0.weight'), 'Missing key.*judge.module.0.weight'),
        (lambda s: s.update({'judge.module.9.weight': torch.zeros(1)}), 'Unexpected key.*judge.module.9.weight'),
        (lambda s: s.update({'judge.optimizer.77.step': torch.zeros(1)}), 'Unexpected key.*judge.optimizer.77.step'),
        (lambda s: s.update({'judge.module.0.weight': torch.zeros(9)}), 'size mismatch'),
    ],
)
def test_state_of_another_module_is_refused(change, message):
    state = dict(Owner().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        Owner().load_state_dict(state)


def test_moves_with_its_owner():
    owner = Owner()
    step(owner, 0)
    owner.double()
    assert {p.dtype for p in owner.judge.module.parameters()} == {torch.float64}
    assert {v.dtype for s in owner.judge.optimizer.state.values() for v in s.values()} == {torch.float64}
    step(owner, 1)


def test_a_copy_is_trained_apart():
    owner = Owner()
    step(owner, 0)
    twin = copy.deepcopy(owner)
    before = [p.clone() for p in owner.judge.module.parameters()]
    step(twin, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, owner.judge.module.parameters(), strict=True))
    assert torch.equal(step(owner, 1), step(Owner_after(0), 1))


def Owner_after(seed):
    owner = Owner()
    step(owner, seed)
    return owner


def test_gradients_are_averaged_over_processes(tmp_path, monkeypatch):
    """As if a second process had a gradient three times as large: the mean is twice that of the first."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        alone, joined = Owner(dict(type='SGD')), Owner(dict(type='SGD'))
        step(alone, 0, lr=0.2)
        monkeypatch.setattr(dist, 'all_reduce', lambda t: t.mul_(4))
        monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
        step(joined, 0, lr=0.1)
        for a, b in zip(alone.judge.module.parameters(), joined.judge.module.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ('optimizer', 'message'),
    [
        (dict(type='SDG'), "unknown optimizer 'SDG'; did you mean 'SGD'"),
        (dict(momentum=0.9), 'optimizer.type'),
        (dict(type='SGD', momentun=0.9), 'optimizer: SGD: .*momentun'),
        (dict(type='SGD', lr=0.1), 'lr is set by lr_mult'),
    ],
)
def test_wrong_optimizers(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        Owner(optimizer)
