"""The counter sees what it is there to see."""

import pytest
import torch

from tests.helpers.dispatch import Operations

X = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
WAITING = {
    'item': lambda x: x.sum().item(),
    'float': lambda x: float(x.sum()),
    'tolist': lambda x: x.sum().tolist(),
    'numpy': lambda x: x.numpy(),
    'cpu': lambda x: x.cpu(),
    'bool': lambda x: bool(x.any()),
    'nonzero': lambda x: x.nonzero(),
    'mask as index': lambda x: x[x > 1],
    'masked_select': lambda x: x.masked_select(x > 1),
    'unique': lambda x: x.unique(),
    'repeats in a tensor': lambda x: x[0].repeat_interleave(x[1].long()),
    'bincount': lambda x: x[1].long().bincount(),
}
FREE = {
    'selection': lambda x: torch.where(x > 1, x, 0),
    'gather': lambda x: x.gather(1, x.argsort(1)),
    'index by numbers': lambda x: x[torch.arange(2)],
    'size': lambda x: x.new_zeros(x.shape[0]) + len(x),
    'known repeats': lambda x: x.repeat_interleave(2, 0),
}


@pytest.mark.parametrize('name', WAITING)
def test_what_waits_is_seen(name):
    with Operations() as operations:
        WAITING[name](X)
    assert operations.seen


@pytest.mark.parametrize('name', FREE)
def test_what_does_not_wait_is_not(name):
    with Operations() as operations:
        FREE[name](X)
    assert operations.seen == [] and operations.uploads == [] and operations.total > 0


def test_numbers_from_python_are_seen():
    with Operations() as operations:
        torch.tensor([1.0, 2.0])
    assert operations.uploads


def test_a_copy_to_the_host_is_seen():
    with Operations() as operations, pytest.raises(NotImplementedError):
        torch.empty(2, device='meta').to('cpu')
    assert operations.seen == ['_to_copy to cpu']


def test_a_loop_is_counted_and_so_is_the_backward():
    with Operations() as operations:
        x = X.clone().requires_grad_()
        for _ in range(5):
            x = x.exp()
        x.sum().backward()
    assert operations.counts['exp'] == 5 and operations.counts['mul'] >= 5
    assert operations.total == sum(operations.counts.values())
