"""A part of the class logits of a dense sigmoid head, against loops over all of its numbers."""

import math

import pytest
import torch

from kd_dense.cache.records import pack, probabilities, size_of, unpack
from kd_dense.cache.sparse import NOTHING
from kd_dense.context import Context
from kd_dense.description import Logits
from kd_dense.distillers import LogitKD

#: Levels of a detector with three anchors per cell; on the last there are fewer than its share of 40 chosen anchors.
SHAPES = ((3, 8, 10), (3, 4, 5), (1, 1, 1))


def detector_like(shapes, num_classes, seed=0):
    """Logits of a trained head: nearly all places are background, each to another degree, some are objects."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for a, h, w in shapes:
        x = torch.randn(a, num_classes, h, w, generator=generator) - 5 - 2 * torch.rand(a, 1, h, w, generator=generator)
        objects = torch.rand(a, 1, h, w, generator=generator) < 0.1
        best = torch.randint(num_classes, (a, 1, h, w), generator=generator)
        x = x.scatter_add(1, best, objects * (3 + 3 * torch.rand(a, 1, h, w, generator=generator)))
        levels.append(x.flatten(0, 1))
    return levels


def kept(levels, k, num_classes, anchors):
    """The levels as a cache gives them back."""
    top_k = {'logits': (k, num_classes, anchors)}
    return [x[0] for x in unpack([pack({'logits': levels}, top_k)], {'logits': len(levels)}, top_k)['logits']]


def by_anchor(levels, num_classes):
    """``[level][anchor][class]`` probabilities, fp64, in plain lists."""
    return [
        torch.sigmoid(x.double()).unflatten(0, (-1, num_classes)).movedim(1, 3).reshape(-1, num_classes).tolist()
        for x in levels
    ]


def chosen_of(p, anchors):
    """``(level, anchor)`` of what is to be chosen."""
    best = {(i, n): max(row) for i, level in enumerate(p) for n, row in enumerate(level)}
    chosen = set()
    for i, level in enumerate(p):
        chosen |= set(sorted(((i, n) for n in range(len(level))), key=best.get)[::-1][: anchors // (4 * len(p))])
    rest = sorted((key for key in best if key not in chosen), key=best.get)[::-1]
    return chosen | set(rest[: anchors - len(chosen)])


@pytest.mark.parametrize('k', [1, 2, 5])
def test_rebuilt__is_what_loops_say(k):
    classes, anchors = 5, 60
    levels = detector_like(SHAPES, classes)
    p, found = by_anchor(levels, classes), by_anchor(kept(levels, k, classes, anchors), classes)
    chosen = chosen_of(p, anchors)
    assert len(chosen) == anchors
    left = [max(row) for i, level in enumerate(p) for n, row in enumerate(level) if (i, n) not in chosen]
    # 256 levels between the least and the largest of those that were not chosen, in log-odds
    lowest = max(-16.0, min(math.log(v / (1 - v)) for level in p for v in map(max, level)))
    half_a_step = (math.log(max(left) / (1 - max(left))) - lowest) / 255 / 2
    for i, level in enumerate(p):
        others = [[] for _ in range(classes)]
        for n, row in enumerate(level):
            if (i, n) not in chosen:
                for c, v in enumerate(row):
                    if c != row.index(max(row)):
                        others[c].append(v)
        for n, row in enumerate(level):
            order = sorted(range(classes), key=row.__getitem__)[::-1]
            for c in range(classes):
                if (i, n) in chosen:
                    exact = row[c] if c in order[:k] else sum(row[x] for x in order[k:]) / (classes - k)
                    assert found[i][n][c] == pytest.approx(exact, rel=5e-3)  # fp16 of a number up to 16
                elif c == order[0]:
                    off = math.log(found[i][n][c] / (1 - found[i][n][c])) - math.log(row[c] / (1 - row[c]))
                    assert abs(off) <= half_a_step * 1.01
                else:
                    assert found[i][n][c] == pytest.approx(sum(others[c]) / len(others[c]), rel=1e-5)


def test_anchors__each_level_has_its_share_and_the_rest_goes_to_the_largest():
    """Worked numbers: 8 of 12 anchors, one class; a quarter of them is 1 for each of two levels."""
    large, small = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2]), torch.tensor([-3.0, -1, -4, -2])
    packed = pack({'logits': [large.reshape(1, 2, 4), small.reshape(1, 2, 2)]}, {'logits': (1, 1, 8)})
    assert packed['t0_i'].tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert packed['t0_v'].tolist() == [[9, 8, 7, 6, 5, 4, 3, -1]]


def test_sums__by_which_losses_are_divided__stay():
    levels = detector_like(((1, 20, 20), (1, 10, 10), (1, 5, 5)), 20)
    for anchors, k in ((20, 1), (100, 3), (300, 20)):
        exact, found = (
            torch.cat([x.double().sigmoid().flatten(1) for x in xs], 1) for xs in (levels, kept(levels, k, 20, anchors))
        )
        assert found.sum().item() == pytest.approx(exact.sum().item(), rel=3e-3)
        assert found.amax(0).sum().item() == pytest.approx(exact.amax(0).sum().item(), rel=3e-3)
        for i in range(3):  # of every level
            a, b = exact.split([400, 100, 25], 1)[i], found.split([400, 100, 25], 1)[i]
            assert b.sum().item() == pytest.approx(a.sum().item(), rel=5e-3)


@pytest.mark.parametrize('num_classes, k, wide', [(5, 2, 1), (80, 5, 1), (300, 5, 2), (5, 5, 1)])
def test_bytes__are_the_formula(num_classes, k, wide):
    levels = detector_like(SHAPES, num_classes)
    n, m = 3 * 80 + 3 * 20 + 1, 50
    chosen = m * (2 + 2 * k + (2 + wide * k) * (k < num_classes))
    others = n * (1 + wide) + 4 * len(SHAPES) * num_classes + 8
    assert size_of(pack({'logits': levels}, {'logits': (k, num_classes, m)})) == chosen + others


def test_many_anchors_and_classes__need_wider_numbers():
    levels = detector_like(((1, 150, 220),), 300)
    levels[0][299, 149, 219] = 9.0
    packed = pack({'logits': levels}, {'logits': (2, 300, 10)})
    assert packed['t0_i'].dtype == torch.int32 and packed['t0_m'].dtype == packed['t0_c'].dtype == torch.int16
    (back,) = kept(levels, 2, 300, 10)
    assert back[:, 149, 219].argmax() == 299 and back[299, 149, 219] == 9.0


def test_all_anchors_and_classes__come_back_as_from_fp16():
    levels = detector_like(SHAPES, 5)
    for a, b in zip(kept(levels, 5, 5, 10_000), levels, strict=True):
        assert a.shape == b.shape and torch.equal(a, b.half().float())


def test_scores_of_0_and_1__stay_finite():
    levels = [torch.full((4, 6, 6), -200.0)]
    levels[0][1, :3] = 200.0
    for k in (1, 2, 4):
        (found,) = kept(levels, k, 4, 5)
        assert found.isfinite().all()
        assert torch.allclose(found.sigmoid(), levels[0].sigmoid(), atol=1e-6)


def test_batch_of_other_canvases__has_nothing_where_it_is_padded():
    top_k = {'logits': (2, 5, 30)}
    wide, tall = detector_like(((3, 4, 8), (3, 2, 4)), 5), detector_like(((3, 8, 4), (3, 4, 2)), 5, seed=1)
    packed = [pack({'logits': levels}, top_k) for levels in (wide, tall)]
    batch = unpack(packed, {'logits': 2}, top_k)['logits']
    assert [tuple(x.shape) for x in batch] == [(2, 15, 8, 8), (2, 15, 4, 4)]
    for x, a, b in zip(batch, kept(wide, 2, 5, 30), kept(tall, 2, 5, 30), strict=True):
        assert torch.equal(x[0, :, : a.shape[1]], a) and (x[0, :, a.shape[1] :] == NOTHING).all()
        assert torch.equal(x[1, :, :, : b.shape[2]], b) and (x[1, :, :, b.shape[2] :] == NOTHING).all()
    alike = unpack([packed[0]] * 2, {'logits': 2}, top_k)['logits']  # in one go
    assert all(torch.equal(x[1], a) for x, a in zip(alike, kept(wide, 2, 5, 30), strict=True))


def test_other_taps__are_kept_as_ever():
    top_k, neck = {'logits': (2, 5, 30)}, torch.randn(4, 8, 10)
    packed = pack({'logits': detector_like(SHAPES, 5), 'neck': [neck]}, top_k, 'int8')
    assert packed['t1_0'].dtype == torch.uint8 and packed['t0_0'].shape == (3, 0, 8, 10)
    back = unpack([packed], {'logits': 3, 'neck': 1}, top_k)
    assert [tuple(x.shape) for x in back['logits']] == [(1, 15, 8, 10), (1, 15, 4, 5), (1, 5, 1, 1)]
    assert torch.allclose(back['neck'][0][0], neck, atol=0.02)


def test_equal_scores__of_which_chance_keeps_some__are_compared_as_probabilities():
    """Two devices may choose others among equals; and logits of what is nearly 0 may differ by much."""
    top_k = {'logits': (1, 2, 4)}
    levels = [torch.full((2, 4, 4), -9.0)]
    other = [torch.full((2, 4, 4), -9.0 + 1e-3)]
    a, b = kept(levels, 1, 2, 4)[0], kept(other, 1, 2, 4)[0]
    p, q = (probabilities(x, 'logits', top_k) for x in (a, b))
    assert (p - q).norm() / q.norm() < 0.01
    assert torch.allclose(probabilities(torch.tensor([0.25]).log(), 'logits', {'logits': (1, 2)}), torch.tensor([0.25]))


def test_gradient__of_few_anchors__is_near_that_of_all():
    """And much nearer than the mean score of each class of a level would bring it."""
    levels = [x - 3 for x in detector_like(((1, 20, 20), (1, 10, 10)), 20)]
    method = LogitKD()
    method.logits = Logits(20, 'sigmoid')
    noise = torch.Generator().manual_seed(7)
    student = [(x + torch.randn(x.shape, generator=noise))[None].requires_grad_() for x in levels]

    def step(teacher):
        loss = method({'logits': student}, {'logits': [x[None] for x in teacher]}, Context((160, 160)))['loss']
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, student)])

    exact = step(levels)
    means = [x.sigmoid().mean((1, 2), keepdim=True).logit().expand_as(x) for x in levels]
    assert (step(kept(levels, 3, 20, 60)) - exact).norm() < 0.1 * exact.norm()
    assert (step(means) - exact).norm() > 0.5 * exact.norm()
