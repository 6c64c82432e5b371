"""The properties of normalised feature distillation, on the distiller with its connectors, and on real models.

Numbers are computed by NumPy in float64, mostly by the correlation form of the loss, which shares nothing with the
code.
"""

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from kd_dense import Distillation
from kd_dense.connectors import Conv1x1
from kd_dense.context import Context
from kd_dense.distillers import NFD
from kd_dense.errors import ConfigError
from tests.helpers import tiny
from tests.helpers.toys import convolved, nothing_masked, probe, ready

ROLE = 'features'


def maps(*shapes, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def loss(method, student, teacher, context=None):
    return method({ROLE: student}, {ROLE: teacher}, context or nothing_masked())['loss']


def nfd(student, teacher, **options):
    return ready(NFD('neck', **options), ROLE, student, teacher)


def correlations(student, teacher):
    """Pearson's r of every channel pair of every image, ``[B, C]``."""
    b, c = student.shape[:2]
    return np.array([[np.corrcoef(student[i, j].flatten(), teacher[i, j].flatten())[0, 1] for j in range(c)]
                     for i in range(b)])  # fmt: skip


def value_of(student, teacher):
    """``2 (1 - mean r)``: the loss without eps."""
    return 2 * (1 - correlations(np.asarray(student), np.asarray(teacher)).mean())


# -- properties 1 to 11 ------------------------------------------------------------------------------------------------


def test_1_equal_maps_give_exactly_zero():
    x = [1000 * t + 7 for t in maps((2, 3, 8, 12), (2, 5, 4, 6))]
    assert loss(nfd(x, x), x, [t.clone() for t in x]).item() == 0


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_2_positive_affine_maps_per_image_and_channel_change_nothing(side):
    student, teacher = maps((2, 3, 8, 12)), maps((2, 3, 8, 12))
    scale, offset = torch.rand(2, 3, 1, 1).double() + 0.1, 10 * torch.randn(2, 3, 1, 1).double()
    moved = {'student': student, 'teacher': teacher}
    moved[side] = [scale * moved[side][0] + offset]
    exact, close = nfd(student, teacher, eps=0), nfd(student, teacher)
    expected = value_of(student[0], teacher[0])
    assert loss(exact, moved['student'], moved['teacher']).item() == pytest.approx(expected, rel=1e-12)
    assert loss(close, moved['student'], moved['teacher']).item() == pytest.approx(expected, rel=1e-2)
    # with eps, the smaller the variance the less it holds
    moved[side] = [1e-3 * moved[side][0]]
    assert abs(loss(close, moved['student'], moved['teacher']).item() / expected - 1) > 0.05


def test_3_opposite_maps_give_four_and_nothing_lies_outside_zero_to_four():
    x = maps((2, 3, 8, 12))
    method = nfd(x, x, eps=0)
    assert loss(method, x, [-x[0]]).item() == pytest.approx(4, rel=1e-12)
    for _ in range(50):  # few cells, so that extreme correlations come up
        assert 0 <= loss(method, maps((1, 3, 1, 3)), maps((1, 3, 1, 3))).item() <= 4


def test_4_is_two_minus_twice_the_mean_correlation_and_twice_pkd():
    student, teacher = maps((1, 3, 8, 8)), maps((1, 3, 8, 8))
    value = loss(nfd(student, teacher, eps=0), student, teacher).item()
    assert value == pytest.approx(value_of(student[0], teacher[0]), rel=1e-12)
    s, t = ((x - x.mean((0, 2, 3), keepdims=True)) / (x.std((0, 2, 3), ddof=1, keepdims=True) + 1e-6)
            for x in (student[0].numpy(), teacher[0].numpy()))  # fmt: skip
    pkd = ((s - t) ** 2).mean() / 2  # over (N, H, W), unbiased, eps outside the root
    assert value * 63 / 64 == pytest.approx(2 * pkd, rel=1e-5)


def test_4_several_images_are_not_pkd():
    """PKD's statistics are of the whole batch, NFD's of each image; ``axes='bhw'`` is PKD's choice."""
    student, teacher = maps((2, 3, 8, 8)), maps((2, 3, 8, 8))
    student[0][1] += 5
    joined = [np.concatenate(list(x[0].numpy()), axis=1)[None] for x in (student, teacher)]  # the images side by side
    over_batch = nfd(student, teacher, axes='bhw', eps=0)
    assert loss(over_batch, student, teacher).item() == pytest.approx(value_of(*joined), rel=1e-12)
    assert abs(loss(nfd(student, teacher, eps=0), student, teacher).item() - value_of(*joined)) > 1e-2


def test_5_unrelated_maps_start_near_two():
    student, teacher = maps((4, 16, 32, 64)), maps((4, 16, 32, 64))
    # r of n unrelated samples has variance 1 / n, and 64 of them are averaged
    deviation = 2 / np.sqrt(64 * 32 * 64)
    assert loss(nfd(student, teacher), student, teacher).item() == pytest.approx(2, abs=4 * deviation)


def test_6_is_the_distance_after_instance_norm():
    student, teacher = maps((2, 3, 8, 12)), maps((2, 3, 8, 12))

    def instance_norm(x):
        x = x.numpy()
        return (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-2)

    expected = ((instance_norm(student[0]) - instance_norm(teacher[0])) ** 2).mean()
    assert loss(nfd(student, teacher, eps=1e-2), student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_7_permutations_of_both_sides_change_nothing_and_of_one_side_do():
    student, teacher = maps((2, 5, 4, 6)), maps((2, 5, 4, 6))
    method = nfd(student, teacher)
    value = loss(method, student, teacher)
    places, channels = torch.randperm(24), torch.randperm(5)

    def moved(x):
        return [x[0].flatten(2)[..., places].reshape(x[0].shape)]

    def renamed(x):
        return [x[0][:, channels]]

    for change in (moved, renamed):
        torch.testing.assert_close(loss(method, change(student), change(teacher)), value)
        assert abs(loss(method, change(student), teacher) - value) > 1e-3


def test_8_gradient_has_no_part_along_offset_and_scale():
    student, teacher = maps((2, 3, 8, 12)), maps((2, 4, 8, 12))
    method = nfd(student, teacher, eps=0)
    connected = method.connectors[0](student[0]).detach().requires_grad_()
    method.connectors[0] = nn.Identity()
    loss(method, [connected], teacher).backward()
    gradient, x = connected.grad.numpy(), connected.detach().numpy()
    centred = x - x.mean((2, 3), keepdims=True)
    size = abs(gradient).sum((2, 3)).max()
    assert size > 1e-4
    assert abs(gradient.sum((2, 3))).max() < 1e-12 * size
    assert abs((gradient * centred).sum((2, 3))).max() < 1e-12 * size * abs(centred).max()


def test_8_a_bias_would_get_no_gradient_and_scaling_connector_rows_changes_nothing():
    student, teacher = maps((2, 3, 8, 12)), maps((2, 4, 8, 12))
    biased = nfd(student, teacher, eps=0, connector=dict(type='Conv1x1', bias=True))
    value = loss(biased, student, teacher)
    value.backward()
    (connector,) = biased.connectors
    assert connector.bias.grad.abs().max() < 1e-12 * connector.weight.grad.abs().max()
    with torch.no_grad():
        connector.weight *= torch.rand(4, 1, 1, 1).double() + 0.2
    torch.testing.assert_close(loss(biased, student, teacher), value)
    assert value.item() == pytest.approx(value_of(convolved(student[0], connector), teacher[0]), rel=1e-9)
    (default,) = nfd(student, teacher).connectors
    assert default.bias is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('zero', ['student', 'teacher', 'both'])
def test_9_all_zero_maps_are_finite(zero, dtype):
    student, teacher = maps((2, 3, 8, 12), dtype=dtype), maps((2, 3, 8, 12), dtype=dtype)
    student = [torch.zeros_like(student[0])] if zero in ('student', 'both') else student
    teacher = [torch.zeros_like(teacher[0])] if zero in ('teacher', 'both') else teacher
    student[0].requires_grad_()
    method = NFD('neck')
    method.setup(probe(ROLE, (2, 3, 8, 12)), probe(ROLE, (2, 3, 8, 12)))
    value = loss(method, student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0 if zero == 'both' else 1, abs=1e-3)
    assert student[0].grad.isfinite().all()


def test_9_the_gradient_of_a_nearly_constant_channel_is_bounded():
    teacher = maps((1, 1, 16, 16))
    student = [(1e-8 * torch.randn(1, 1, 16, 16, dtype=torch.float64)).requires_grad_()]
    loss(nfd(student, teacher), student, teacher).backward()
    # d/dx of a mean of squares of values of size 1, times 1 / sqrt(var + eps)
    assert student[0].grad.abs().max() < 2 * 4 / 256 / np.sqrt(1e-5)
    free = [student[0].detach().clone().requires_grad_()]
    loss(nfd(student, teacher, eps=0), free, teacher).backward()
    assert free[0].grad.abs().max() > 1e3 * student[0].grad.abs().max()


def test_10_teacher_gets_no_gradient_and_connectors_are_parameters_where_widths_differ():
    student, teacher = maps((2, 3, 8, 12), (2, 5, 4, 6)), maps((2, 4, 8, 12), (2, 5, 4, 6))
    method = nfd(student, teacher)
    for t in teacher:
        t.requires_grad_()
    loss(method, [s.requires_grad_() for s in student], teacher).backward()
    assert all(t.grad is None for t in teacher) and all(s.grad.abs().sum() > 0 for s in student)
    assert [name for name, _ in method.named_parameters()] == ['connectors.0.weight']
    assert type(method.connectors[0]) is Conv1x1 and method.connectors[0].weight.shape == (4, 3, 1, 1)
    assert method.connectors[0].weight.grad.abs().sum() > 0


def test_11_a_batch_is_the_mean_of_its_images_and_accumulation_is_exact():
    student, teacher = maps((3, 3, 8, 12)), maps((3, 4, 8, 12))
    method = nfd(student, teacher)
    whole = loss(method, student, teacher)
    whole.backward()
    (weight,) = method.parameters()
    expected, weight.grad = weight.grad, None
    parts = [loss(method, [student[0][i : i + 1]], [teacher[0][i : i + 1]]) for i in range(3)]
    (sum(parts) / 3).backward()
    torch.testing.assert_close(sum(parts) / 3, whole)
    torch.testing.assert_close(weight.grad, expected)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masked_cells_take_no_part_in_statistics_and_mean():
    student, teacher = maps((2, 3, 4, 6)), maps((2, 3, 4, 6))
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    labels[0, :4], labels[1, :, :8] = 255, 255
    context = Context((16, 24), image_sizes=torch.tensor([[16, 24], [12, 24]]), label_map=labels)
    valid = [(slice(1, 4), slice(0, 6)), (slice(0, 3), slice(2, 6))]  # rows and columns of cells that are left
    weighted, cells = 0.0, 0
    for i, (rows, columns) in enumerate(valid):
        s, t = (x[0][i : i + 1, :, rows, columns].numpy() for x in (student, teacher))
        size = s.shape[2] * s.shape[3]
        weighted, cells = weighted + value_of(s, t) * size, cells + size
    value = loss(nfd(student, teacher, eps=0), student, teacher, context).item()
    assert value == pytest.approx(weighted / cells, rel=1e-12)


def test_an_image_that_is_ignored_altogether_has_no_loss_and_no_gradient():
    student, teacher = maps((2, 3, 4, 6)), maps((2, 3, 4, 6))
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    labels[1] = 255
    student[0].requires_grad_()
    value = loss(nfd(student, teacher, eps=0), student, teacher, Context((16, 24), label_map=labels))
    value.backward()
    assert value.item() == pytest.approx(value_of(student[0][:1].detach(), teacher[0][:1]), rel=1e-12)
    assert (student[0].grad[1] == 0).all() and student[0].grad[0].abs().sum() > 0


# -- layers ------------------------------------------------------------------------------------------------------------


def test_any_number_of_layers_are_summed_and_the_teacher_is_resized():
    student, teacher = maps((2, 3, 8, 12), (2, 4, 4, 6), (2, 5, 2, 3)), maps((2, 3, 8, 12), (2, 6, 4, 6), (2, 5, 2, 3))
    method = nfd(student, teacher, eps=0)
    connected = [student[0], convolved(student[1], method.connectors[1]), student[2]]
    expected = sum(value_of(s, t) for s, t in zip(connected, teacher, strict=True))
    assert loss(method, student, teacher).item() == pytest.approx(expected, rel=1e-12)
    # a teacher of twice the size, each cell repeated, is the same teacher after bilinear resizing at cell centres
    large = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in teacher]
    assert loss(method, student, large).item() == pytest.approx(expected, rel=1e-5)


def test_a_single_cell_has_no_pattern():
    student, teacher = maps((2, 3, 1, 1)), maps((2, 3, 1, 1))
    with pytest.raises(ConfigError, match='more than one cell'):
        loss(nfd(student, teacher), student, teacher)
    assert loss(nfd(student, teacher, axes='c'), student, teacher).item() > 0


def test_unknown_axes():
    with pytest.raises(ConfigError, match="axes must be one of .*'hw'.*not 'w'"):
        NFD('neck', axes='w')


# -- on real models ----------------------------------------------------------------------------------------------------

VARIANTS = {
    'backbone': ('backbone:3', 1),
    'two stages': (['backbone:2', 'backbone:3'], 2),
    'head': ('decode_head.fusion_conv', 0),  # as wide on both sides
    'logits': ('logits', 0),
}


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_take_a_step_in_a_segmentor(variant, amp):
    from kd_dense.models.build import build_model

    taps, connectors = VARIANTS[variant]
    teacher = build_model(tiny.segmentor(8), 'teacher')
    model = Distillation(tiny.segmentor(4), teacher, dict(nfd=dict(type='NFD', taps=taps)))
    model.progress = 0.0
    assert len(list(model.distillers.parameters())) == connectors
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = model.train().train_step(tiny.segmentation_batch(), wrapper)
    model.distillers.verify_gradients()
    # weight 3, and each layer lies in 0..4
    layers = len(taps) if isinstance(taps, list) else 1
    assert 0 < logs['kd.nfd.loss'].item() < 3 * 4 * layers and logs['kd.nfd.loss'].dtype == torch.float32
