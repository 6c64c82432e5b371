"""Views are replayed exactly, and a sampler goes through all of them."""

import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from kd_dense import ConfigError
from kd_dense.cache import ViewBank, ViewSampler
from kd_dense.cache.views import replayed, view_seed


class Drawing:
    """Every item is numbers of all three generators; where it is rejected, another one is drawn, as MMEngine does."""

    metainfo = dict(classes=('a',))

    def __len__(self):
        return 5

    def __getitem__(self, index):
        while random.random() < 0.3:
            index = np.random.randint(5)
        return torch.cat([torch.tensor([index, random.random(), np.random.rand()]), torch.rand(2)])


def test_views__are_replayed_exactly_and_differ():
    bank = ViewBank(Drawing(), views=3, seed=1)
    first = [bank[i] for i in range(15)]
    order = torch.randperm(15).tolist()
    torch.rand(7), np.random.rand(7), random.random()
    assert all(torch.equal(bank[i], first[i]) for i in order)
    assert len({tuple(x[1:].tolist()) for x in first}) == 15
    assert not torch.equal(ViewBank(Drawing(), views=3, seed=2)[0], first[0])


@pytest.mark.parametrize('workers', [1, 2])
def test_views__are_alike_in_worker_processes(workers):
    bank = ViewBank(Drawing(), views=2)
    there = DataLoader(bank, batch_sampler=[[9, 3], [0, 7], [4]], num_workers=workers, multiprocessing_context='fork')
    for batch, items in zip(there, [[9, 3], [0, 7], [4]], strict=True):
        assert torch.equal(batch, torch.stack([bank[i] for i in items]))


def test_replay__leaves_all_random_states_alone():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
    with pytest.raises(KeyError), replayed(3):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_seeds__have_32_bits_and_differ():
    seeds = {view_seed(s, i, v) for s in range(3) for i in range(50) for v in range(4)}
    assert len(seeds) == 600 and all(0 <= seed < 2**32 for seed in seeds)


def test_bank__is_the_data_set_to_its_surroundings():
    bank = ViewBank(Drawing(), views=3)
    assert len(bank) == 5 and bank.metainfo == Drawing.metainfo
    assert torch.equal(pickle.loads(pickle.dumps(bank))[7], bank[7])
    with pytest.raises(AttributeError):
        bank.nothing()
    with pytest.raises(ConfigError, match='views: must be a whole number of at least 1, not 0'):
        ViewBank(Drawing(), views=0)


@pytest.mark.parametrize('shuffle', [True, False])
def test_infinite_sampler__keeps_its_order_and_every_view_comes_once_in_as_many_passes(shuffle):
    bank = ViewBank(Drawing(), views=3)
    plain = iter(InfiniteSampler(Drawing(), shuffle, seed=4))
    sampler = iter(ViewSampler(dict(type='InfiniteSampler', shuffle=shuffle), bank, seed=4))
    items = [next(sampler) for _ in range(15)]
    assert [i % 5 for i in items] == [next(plain) for _ in range(15)]
    assert sorted(items) == list(range(15))
    assert len({i // 5 for i in items[:5]}) > 1  # a pass has samples of several views
    assert [next(sampler) % 5 for _ in range(2)] == [next(plain) for _ in range(2)]


def test_infinite_sampler__several_processes_see_the_views_of_one(monkeypatch):
    def drawn(rank, processes, count):
        info = lambda: (rank, processes)  # noqa: E731
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', info)
        monkeypatch.setattr('kd_dense.cache.views.get_dist_info', info)
        sampler = iter(ViewSampler(dict(type='InfiniteSampler'), ViewBank(Drawing(), views=3), seed=4))
        return [next(sampler) for _ in range(count)]

    alone, both = drawn(0, 1, 12), [drawn(rank, 2, 6) for rank in range(2)]
    assert alone == [item for pair in zip(*both, strict=True) for item in pair]


def test_default_sampler__the_epoch_chooses_the_view():
    bank = ViewBank(Drawing(), views=2)
    sampler = ViewSampler(dict(type='DefaultSampler', shuffle=True), bank, seed=4)
    plain = DefaultSampler(Drawing(), True, seed=4)
    epochs = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch), plain.set_epoch(epoch)
        epochs.append(list(sampler))
        assert [i % 5 for i in epochs[-1]] == list(plain)
    assert sorted(epochs[0] + epochs[1]) == list(range(10)) and sorted(epochs[2]) == sorted(epochs[0])
    assert len(sampler) == 5


def test_distributed_sampler_of_torch__every_view_comes_once_in_as_many_epochs():
    """As in a training of Ultralytics on several GPUs; four images, so that none is repeated to fill up."""
    bank, items = ViewBank(Drawing(), views=2), []
    bank.dataset.__class__ = type('Four', (Drawing,), {'__len__': lambda self: 4})
    for rank in range(2):
        plain = DistributedSampler(bank, 2, rank, shuffle=True, seed=3)
        sampler = ViewSampler(plain, bank)
        for epoch in range(2):
            plain.set_epoch(epoch)  # by the loader, which knows of no views
            drawn = list(sampler)
            assert [i % 4 for i in drawn] == list(plain)
            items += drawn
    assert sorted(items) == list(range(8))


def test_sampler_of_torch__goes_through_the_views_and_begins_where_it_is_told_to():
    bank = ViewBank(Drawing(), views=3)
    whole, rest = (ViewSampler(SequentialSampler(bank), bank) for _ in range(2))
    passes = [list(whole) for _ in range(4)]
    assert sorted(sum(passes[:3], [])) == list(range(15)) and passes[3] == passes[0]
    rest.begin(2)  # a resumed run that does not draw the first two again
    assert [list(rest), list(rest)] == passes[2:]
