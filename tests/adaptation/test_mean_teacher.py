"""The moving average against closed forms in float64."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kd_dense.adaptation import MeanTeacher
from kd_dense.errors import ConfigError
from tests.helpers.dispatch import Operations


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu())


def student():
    return Net().double()


def tensors(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def change(model):
    """Something else in every parameter and buffer."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    for name, b in model.named_buffers():
        b.copy_(b + 3 if 'num_batches' in name else torch.rand_like(b) + 0.5)
    return model


def test_starts_as_the_student_and_frozen():
    net = student()
    teacher = MeanTeacher(net)
    for name, value in tensors(net).items():
        assert torch.equal(teacher.model.state_dict()[name], value), name
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not {id(p) for p in teacher.model.parameters()} & {id(p) for p in net.parameters()}
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_distance_to_a_fixed_student_shrinks_geometrically():
    net = student()
    teacher = MeanTeacher(net, decay=0.99)
    start = tensors(net)
    change(net)
    for _ in range(69):
        teacher.update(net)
    assert teacher.updates == 69
    for name, now in net.state_dict().items():
        if now.is_floating_point():
            expected = now + 0.99**69 * (start[name] - now)
            torch.testing.assert_close(teacher.model.state_dict()[name], expected, rtol=1e-12, atol=1e-13)
    assert abs(0.99**69 - 0.5) < 2e-4  # the half-life of the default


def test_average_of_a_moving_student_is_the_weighted_sum_of_its_past():
    net = student()
    teacher = MeanTeacher(net, decay=0.8)
    past = [net.conv.weight.detach().clone()]
    for _ in range(7):
        change(net)
        past.append(net.conv.weight.detach().clone())
        teacher.update(net)
    expected = 0.8**7 * past[0] + sum(0.2 * 0.8 ** (7 - k) * past[k] for k in range(1, 8))
    torch.testing.assert_close(teacher.model.conv.weight, nn.Parameter(expected, requires_grad=False))


def test_warmup():
    net = student()
    teacher = MeanTeacher(net, decay=0.9, warmup=5)
    expected = net.conv.weight.detach().clone()
    for n in range(1, 9):
        d = 0.9 * (1 - math.exp(-n / 5))
        assert teacher.decay_at(n) == pytest.approx(d, rel=1e-14)
        change(net)
        expected = d * expected + (1 - d) * net.conv.weight.detach()
        teacher.update(net)
    torch.testing.assert_close(teacher.model.conv.weight.detach(), expected, rtol=1e-13, atol=1e-14)
    assert MeanTeacher(net, decay=0.9).decay_at(1) == 0.9


def test_zero_decay_is_the_student():
    net = student()
    teacher = MeanTeacher(net, decay=0)
    teacher.update(change(net))
    assert all(torch.equal(a, b) for a, b in zip(teacher.model.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize('policy', ['average', 'copy', 'keep'])
def test_buffers(policy):
    net = student()
    teacher = MeanTeacher(net, decay=0.9, buffers=policy)
    before = tensors(net)
    net(5 + 2 * torch.randn(4, 3, 8, 8).double())  # shifted data move the running statistics
    teacher.update(net)
    now, own = net.state_dict(), teacher.model.state_dict()
    for name in ('norm.running_mean', 'norm.running_var'):
        assert not torch.equal(before[name], now[name])
        expected = {
            'average': 0.9 * before[name] + 0.1 * now[name],
            'copy': now[name],
            'keep': before[name],
        }[policy]
        torch.testing.assert_close(own[name], expected)
    assert own['norm.num_batches_tracked'] == (0 if policy == 'keep' else 1)


def test_runs_in_evaluation_mode_whoever_called_train():
    net = student()
    teacher = MeanTeacher(net)
    before = tensors(teacher.model)
    x = torch.randn(2, 3, 8, 8).double()
    teacher.model.train()
    out = teacher.run(lambda model: model(x))
    assert not out.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    torch.testing.assert_close(out, net.eval()(x).detach())


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_its_owner_have_none(copied):
    net = student()
    assert copied({'mean_teacher': MeanTeacher(net)})['mean_teacher'] is None


def test_resumes_bit_for_bit():
    net = student()
    teacher = MeanTeacher(net, decay=0.7, warmup=10)
    for _ in range(3):
        teacher.update(change(net))
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    resumed = MeanTeacher(student(), decay=0.7, warmup=10)
    resumed.load_state_dict(state)
    change(net)
    for one in (teacher, resumed):
        one.update(net)
    assert resumed.updates == teacher.updates == 4
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_state_of_another_model_is_refused():
    with pytest.raises(ConfigError, match='mean teacher in the checkpoint is of another model.*conv.weight'):
        MeanTeacher(student()).load_state_dict(MeanTeacher(nn.Linear(2, 2)).state_dict())
    with pytest.raises(ConfigError, match='updates'):
        teacher = MeanTeacher(student())
        teacher.load_state_dict({k: v for k, v in teacher.state_dict().items() if k != 'updates'})


def test_reset():
    net = student()
    teacher = MeanTeacher(net)
    teacher.update(change(net))
    teacher.reset(change(net))
    assert teacher.updates == 0
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in teacher.model.state_dict().items())


def test_accumulated_gradients_give_the_teacher_of_a_large_batch():
    """Two halves, one step, one update: without batch norm the same as the whole batch at once."""
    x, y = torch.randn(8, 3, 6, 6).double(), torch.randn(8, 2, 6, 6).double()

    def train(parts):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
        teacher = MeanTeacher(net, decay=0.9)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for part in torch.arange(8).chunk(parts):
                ((net(x[part]) - y[part]).square().mean() / parts).backward()
            optimizer.step()
            teacher.update(net)
        return teacher.model

    for a, b in zip(train(1).parameters(), train(2).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_follows_its_owner():
    teacher = MeanTeacher(student())
    teacher.follow(lambda t: t.float() if t.is_floating_point() else t)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    net = change(student()).float()
    teacher.update(net)
    torch.testing.assert_close(teacher.model.norm.running_mean, 0.01 * net.norm.running_mean)


def test_statistics_are_averaged_over_processes(tmp_path, monkeypatch):
    """As if a second process had statistics three times as large: the mean is twice that of the first."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        net = student()
        teacher = MeanTeacher(net, decay=0.0)
        change(net)
        monkeypatch.setattr(dist, 'all_reduce', lambda t: t.mul_(4))
        monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
        before = tensors(net)
        teacher.update(net)
        torch.testing.assert_close(teacher.model.norm.running_mean, 2 * net.norm.running_mean)
        torch.testing.assert_close(teacher.model.norm.running_var, 2 * net.norm.running_var)
        assert torch.equal(teacher.model.conv.weight, net.conv.weight)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    finally:
        dist.destroy_process_group()


def test_does_not_wait_for_the_device():
    net = student()
    teacher = MeanTeacher(net)
    with Operations() as operations:
        teacher.update(net)
    assert operations.seen == [] and operations.uploads == []


@pytest.mark.parametrize(('policy', 'expected'), [('average', (1, 1)), ('copy', (1, 1)), ('keep', (1, 0))])
def test_all_tensors_move_at_once(policy, expected):
    """One operation for whatever is averaged and one for whatever is copied, however many tensors there are."""
    for width in (1, 6):
        net = nn.Sequential(*(student() for _ in range(width)))
        teacher = MeanTeacher(net, buffers=policy)
        with Operations() as operations:
            teacher.update(net)
        moves = {name: count for name, count in operations.counts.items() if name not in ('detach', 'alias')}
        assert (moves.pop('_foreach_lerp_'), moves.pop('_foreach_copy_', 0)) == expected
        assert moves == {}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(decay=1), 'mean_teacher.decay: .*not 1'),
        (dict(decay='0.9'), 'mean_teacher.decay'),
        (dict(buffers='averaged'), "unknown policy 'averaged'; did you mean 'average'"),
        (dict(warmup=-1), 'mean_teacher.warmup'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MeanTeacher(student(), **options)
