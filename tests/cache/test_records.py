"""What is kept of a teacher's outputs, by worked numbers."""

import numpy as np
import pytest
import torch

from kd_dense import DistillationError
from kd_dense.cache.records import from_int8, from_top_k, pack, to_int8, to_top_k, unpack
from kd_dense.losses import class_kl


def test_top_k__worked_numbers():
    p = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    kept, classes = to_top_k(torch.tensor(np.log(p) + 7.0)[[3, 0, 4, 2, 1], None, None], 2)
    assert kept.dtype == torch.float16 and classes.dtype == torch.uint8 and kept.shape == (2, 1, 1)
    assert classes.flatten().tolist() == [1, 4]  # where 0.5 and 0.3 were put
    found = from_top_k(kept[None], classes[None], 5).exp().flatten().double().numpy()
    rest = (1 - 0.5 - 0.3) / 3
    assert np.allclose(found, [rest, 0.5, rest, rest, 0.3], atol=2e-4)


def test_top_k__sums_to_one_and_is_finite_even_where_fp16_rounds_up():
    logits = torch.randn(19, 40, 50) * 20
    kept, classes = to_top_k(logits, 3)
    assert (kept.float().sum(0) > 1).any()  # the case that needs the floor
    found = from_top_k(kept[None], classes[None], 19)
    assert found.isfinite().all()
    assert torch.allclose(found.exp().sum(1), torch.ones(1, 40, 50), atol=1e-6)
    assert torch.equal(found.argmax(1)[0], logits.argmax(0)) or (kept[0] == kept[1]).any()


def test_top_k__a_uniform_tail_comes_back_at_every_temperature():
    teacher = torch.full((1, 6, 4, 4), -1.0)
    teacher.scatter_(1, torch.randint(0, 6, (1, 2, 4, 4)), torch.rand(1, 2, 4, 4) * 3)
    back = from_top_k(*(part[None] for part in to_top_k(teacher[0], 2)), 6)
    student = torch.randn(1, 6, 4, 4)
    for temperature in (1.0, 4.0):
        expected = class_kl(student, teacher, temperature)
        assert class_kl(student, back, temperature).item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_top_k__of_all_classes__has_the_temperature_of_the_logits(temperature):
    """Where nothing is left out and nothing rounded, ``softmax(log p / T)`` is ``softmax(z / T)``."""
    logits = torch.randn(2, 9, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    kept, classes = logits.softmax(1).topk(9, 1)
    found = (from_top_k(kept, classes, 9) / temperature).softmax(1)
    assert torch.allclose(found, (logits / temperature).softmax(1), atol=1e-6)


def test_many_classes__need_wider_indices():
    assert to_top_k(torch.randn(300, 2, 2), 4)[1].dtype == torch.int16
    kept, classes = to_top_k(torch.eye(300)[299][:, None, None] * 50, 1)
    assert from_top_k(kept[None], classes[None], 300).argmax(1).item() == 299


def test_pack_and_unpack__give_the_batch_in_fp32():
    outputs = {'neck': [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)], 'tokens': [torch.randn(2, 7, 3)]}
    samples = [pack({n: [x[i] for x in xs] for n, xs in outputs.items()}, {}) for i in range(2)]
    assert all(t.dtype == torch.float16 for sample in samples for t in sample.values())
    back = unpack(samples, {'neck': 2, 'tokens': 1}, {})
    for name, tensors in outputs.items():
        for a, b in zip(back[name], tensors, strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape and torch.equal(a, b.half().float())


def test_maps_of_other_canvases__get_zeros_at_the_right_and_at_the_bottom():
    tall, wide = torch.randn(3, 6, 2), torch.randn(3, 4, 5)
    (batch,) = unpack([pack({'neck': [x]}, {}) for x in (tall, wide)], {'neck': 1}, {})['neck']
    expected = np.zeros((2, 3, 6, 5), np.float16)
    expected[0, :, :, :2], expected[1, :, :4] = tall.half().numpy(), wide.half().numpy()
    assert np.array_equal(batch.half().numpy(), expected)


def test_integers__stay_what_they_are():
    sample = pack({'index': [torch.tensor([3, 70000])]}, {})
    assert unpack([sample, sample], {'index': 1}, {})['index'][0].tolist() == [[3, 70000]] * 2


def test_tokens_of_other_canvases__one_sentence():
    samples = [pack({'tokens': [torch.randn(n, 3)]}, {}) for n in (4, 5)]
    with pytest.raises(DistillationError, match=r"'tokens' has other shapes .*crop all images to one size"):
        unpack(samples, {'tokens': 1}, {})


@pytest.mark.parametrize('value', [1e5, float('nan'), float('-inf')])
def test_numbers_that_fp16_can_not_hold__one_sentence(value):
    with pytest.raises(DistillationError, match="its output at 'neck' reaches .* fp16 can not hold"):
        pack({'neck': [torch.tensor([1.0, value])]}, {})


def test_int8__worked_numbers():
    levels, scale = to_int8(torch.tensor([[[0.0, 1.0, 2.55]], [[-3.0, -3.0, -3.0]]]))
    assert levels.dtype == torch.uint8 and levels.tolist() == [[[0, 100, 255]], [[0, 0, 0]]]
    assert scale.shape == (2, 2, 1, 1) and torch.allclose(scale[:, 0].flatten(), torch.tensor([0.0, 0.01]))
    assert torch.allclose(from_int8(levels, scale), torch.tensor([[[0.0, 1.0, 2.55]], [[-3.0, -3.0, -3.0]]]))


@pytest.mark.parametrize('shape, channel', [((5, 9, 11), 0), ((40, 5), 1)], ids=['map', 'tokens'])
def test_int8__is_off_by_half_a_step_of_its_channel(shape, channel):
    widths = torch.logspace(-3, 3, 5)
    x = torch.randn(shape).exp() * (widths[:, None, None] if channel == 0 else widths)
    found = from_int8(*to_int8(x))
    by_channel = x.movedim(channel, 0).flatten(1).double()
    step = (by_channel.amax(1) - by_channel.amin(1)) / 255
    error = (found.movedim(channel, 0).flatten(1).double() - by_channel).abs().amax(1)
    assert (error <= step * 0.5001).all() and (error > step * 0.3).all()


def test_int8__half_of_the_bytes_and_zeros_where_a_batch_is_padded():
    tall, wide = torch.rand(3, 60, 20) + 1, torch.rand(3, 40, 50) + 1
    packed = [pack({'neck': [x], 'pooled': [x.mean((1, 2))]}, {}, 'int8') for x in (tall, wide)]
    assert {key: t.dtype for key, t in packed[0].items()} == {
        't0_0': torch.uint8,
        't0_0_s': torch.float32,
        't1_0': torch.float16,
    }
    (batch,) = unpack(packed, {'neck': 1, 'pooled': 1}, {})['neck']
    assert torch.allclose(batch[0, :, :, :20], tall, atol=1 / 400) and not batch[0, :, :, 20:].any()
    assert torch.allclose(batch[1, :, :40], wide, atol=1 / 400) and not batch[1, :, 40:].any()


def test_int8__refuses_what_fp16_would():
    with pytest.raises(DistillationError, match="its output at 'neck' reaches nan"):
        pack({'neck': [torch.full((2, 3, 3), float('nan'))]}, {}, 'int8')
