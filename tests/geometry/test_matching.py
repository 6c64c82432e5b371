"""Costs of all pairs against loops, and the assignment against all permutations."""

import numpy as np
import pytest
import torch

from kd_dense.geometry.matching import assign, pair_costs
from tests.helpers.queries import ACTIVATIONS, WEIGHTS, all_costs, boxes, cheapest


def predictions(count, activation='sigmoid', images=2):
    return 2 * torch.randn(images, count, ACTIVATIONS[activation], dtype=torch.float64), boxes(images, count)


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('weights', [WEIGHTS, (1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 1.0)])
def test_costs_of_all_pairs(activation, weights):
    student, teacher, scores = predictions(5, activation), predictions(3, activation), torch.rand(2, 3).double()
    found = pair_costs(student, teacher, scores, activation, weights)
    expected = all_costs(student, teacher, scores.numpy(), activation, weights)
    assert found.shape == (2, 3, 5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize('columns', [4, 6])
def test_assignment_is_the_best_of_all(columns):
    costs = torch.randn(3, 2, 4, columns, dtype=torch.float64)
    found = assign(costs)
    assert found.shape == (3, 2, 4) and found.dtype == torch.int64
    for layer in range(3):
        for image in range(2):
            assert tuple(found[layer, image].tolist()) == cheapest(costs[layer, image].numpy())


def test_assignment_takes_one_copy_to_the_host(monkeypatch):
    copies = []
    for name in ('cpu', 'item', 'tolist', '__bool__', '__int__', '__float__'):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            copies.append((_name, tuple(self.shape)))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    assign(torch.randn(6, 4, 5, 7))
    assert copies == [('cpu', (24, 5, 7))]
