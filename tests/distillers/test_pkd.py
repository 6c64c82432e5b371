"""PKD by its correlation form and by the public code's formula, in NumPy and float64, and on real detectors."""

import math

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.distillers import NFD, PKD
from kd_dense.errors import ConfigError
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.toys import convolved, nothing_masked, ready, resized

ROLE = 'features'


def maps(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def loss(method, student, teacher, context=None):
    losses = method({ROLE: student}, {ROLE: teacher}, context or nothing_masked())
    assert list(losses) == ['loss']
    return losses['loss']


def pkd(student, teacher, **options):
    return ready(PKD(**options), ROLE, student, teacher)


def one_minus_correlation(student, teacher, masks=None):
    """``1 - mean over channels of r``; of the cells that count, channel by channel."""
    student, teacher = np.asarray(student), np.asarray(teacher)
    values = []
    for c in range(student.shape[1]):
        s, t = student[:, c], teacher[:, c]
        s, t = (s.ravel(), t.ravel()) if masks is None else (s[masks], t[masks])
        values.append(1 - np.corrcoef(s, t)[0, 1])
    return np.mean(values)


def public_code(student, teacher):
    """Unbiased deviation over batch and positions, plus 1e-6; half of the mean square."""
    s, t = (
        (x - x.mean((0, 2, 3), keepdims=True)) / (x.std((0, 2, 3), ddof=1, keepdims=True) + 1e-6)
        for x in (np.asarray(student), np.asarray(teacher))
    )
    return ((s - t) ** 2).mean() / 2


@pytest.mark.parametrize('batch', [1, 3])
def test_is_one_minus_the_correlation_and_the_public_code_up_to_its_unbiased_deviation(batch):
    student, teacher = maps((batch, 4, 5, 6), (batch, 3, 2, 3)), maps((batch, 4, 5, 6), (batch, 3, 2, 3))
    value = loss(pkd(student, teacher, eps=1e-30), student, teacher).item()
    expected = sum(one_minus_correlation(s, t) for s, t in zip(student, teacher, strict=True))
    assert value == pytest.approx(expected, rel=1e-12)
    theirs = 0.0
    for s, t in zip(student, teacher, strict=True):
        n = batch * s[0, 0].numel()
        theirs += public_code(s, t) * n / (n - 1)
    assert value == pytest.approx(theirs, rel=1e-5)
    assert loss(pkd(student, teacher), student, teacher).item() == pytest.approx(expected, rel=1e-6)  # the default eps


def test_equal_unrelated_and_opposite_maps():
    x, y = maps((2, 16, 32, 32)), maps((2, 16, 32, 32))
    method = pkd(x, y)
    assert loss(method, x, [x[0].clone()]) == 0
    assert loss(method, x, [-x[0]]).item() == pytest.approx(2, rel=1e-6)
    # r of n unrelated samples has variance 1 / n, and 16 of them are averaged
    assert loss(method, x, y).item() == pytest.approx(1, abs=4 / math.sqrt(16 * 2 * 32 * 32))


def test_scale_and_offset_of_a_channel_do_not_matter_but_those_of_an_image_do():
    student, teacher = maps((3, 4, 5, 6)), maps((3, 4, 5, 6))
    method = pkd(student, teacher)
    value = loss(method, student, teacher)
    scale, offset = torch.rand(1, 4, 1, 1).double() + 0.5, 10 * torch.randn(1, 4, 1, 1).double()
    torch.testing.assert_close(loss(method, student, [scale * teacher[0] + offset]), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(method, [100 * student[0]], teacher), value, rtol=1e-5, atol=0)
    image = torch.tensor([0.0, 1, 5]).double()[:, None, None, None]
    assert abs(loss(method, [student[0] + image], teacher) - value) > 1e-2
    assert abs(loss(method, [-student[0]], teacher) - (2 - value)) < 1e-6


def test_half_of_nfd_for_one_image():
    student, teacher = maps((1, 4, 5, 6)), maps((1, 4, 5, 6))
    nfd = ready(NFD('neck', eps=1e-8), ROLE, student, teacher)
    assert 2 * loss(pkd(student, teacher), student, teacher).item() == pytest.approx(
        loss(nfd, student, teacher).item(), rel=1e-12
    )


def test_every_level_and_channel_counts_the_same_whatever_its_magnitude():
    student, teacher = maps((2, 4, 8, 8), (2, 4, 4, 4)), maps((2, 4, 8, 8), (2, 4, 4, 4))
    method = pkd(student, teacher)
    value = loss(method, student, teacher)
    loud = [teacher[0] * 1000, teacher[1] * torch.tensor([1.0, 10, 100, 1000]).double()[:, None, None]]
    torch.testing.assert_close(loss(method, student, loud), value, rtol=1e-5, atol=0)


def test_padding_takes_no_part():
    student, teacher = maps((2, 3, 8, 8)), maps((2, 3, 8, 8))
    context = Context((64, 64), torch.tensor([[64, 40], [48, 64]]))
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :, :5], masks[1, :6] = True, True
    expected = one_minus_correlation(student[0], teacher[0], masks)
    assert loss(pkd(student, teacher, eps=1e-30), student, teacher, context).item() == pytest.approx(
        expected, rel=1e-12
    )
    garbage = [torch.where(torch.tensor(masks)[:, None], x[0], math.nan) for x in (student, teacher)]
    value = loss(pkd(student, teacher, eps=1e-30), garbage[:1], garbage[1:], context)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    whole = loss(pkd(student, teacher, use_mask=False), student, teacher, context).item()
    assert whole == pytest.approx(one_minus_correlation(student[0], teacher[0]), rel=1e-6)


def test_another_width_and_another_resolution():
    student, teacher = maps((2, 3, 4, 4)), maps((2, 5, 8, 8))
    method = pkd(student, teacher)
    (connector,) = method.connectors
    assert connector.weight.shape == (5, 3, 1, 1) and connector.bias is None
    expected = one_minus_correlation(convolved(student[0], connector), resized(teacher[0].numpy(), (4, 4)))
    assert loss(method, student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_goes_to_the_student_and_a_constant_channel_is_harmless():
    student, teacher = maps((2, 3, 4, 5)), maps((2, 3, 4, 5))
    method = pkd(student, teacher)
    assert torch.autograd.gradcheck(lambda s: loss(method, [s], teacher), student[0].requires_grad_())
    teacher[0].requires_grad_()
    loss(method, student, teacher).backward()
    assert teacher[0].grad is None and student[0].grad.abs().sum() > 0
    dead = student[0].detach().clone()
    dead[:, 1] = 3
    dead.requires_grad_()
    value = loss(method, [dead], [t.detach() for t in teacher])
    value.backward()
    assert value.isfinite() and dead.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_fp32(dtype):
    student, teacher = ([300 * x.to(dtype) for x in maps((2, 3, 16, 16))] for _ in range(2))
    value = loss(pkd(student, teacher), student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(one_minus_correlation(student[0].double(), teacher[0].double()), rel=1e-4)


def test_does_not_wait_for_the_device():
    student, teacher = maps((2, 3, 8, 8)), maps((2, 4, 8, 8))
    method, context = pkd(student, teacher), Context((64, 64), torch.tensor([[64, 40], [48, 64]]))
    with Operations() as operations:
        loss(method, [student[0].requires_grad_()], teacher, context).backward()
    assert operations.seen == [] and operations.uploads == []


def test_defaults_and_options():
    assert PKD().taps[ROLE].student == ('neck',) and PKD.default_loss_weight == 6.0 and not PKD.needs_boxes
    with pytest.raises(ConfigError, match='eps must be a finite number > 0, not 0'):
        PKD(eps=0)


@pytest.mark.parametrize('kind, amp', [('RetinaNet', False), ('RetinaNet', True), ('FasterRCNN', False)])
def test_takes_a_step_in_a_detector(kind, amp):
    from kd_dense.models.build import build_model

    teacher = build_model(tiny.detector(kind, 8), 'teacher')
    model = Distillation(tiny.detector(kind, 4), teacher, dict(pkd=dict(type='PKD')))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = model.train().train_step(tiny.detection_batch(), wrapper)
    model.distillers.verify_gradients()
    assert 0 < logs['kd.pkd.loss'].item() < 6 * 2 * 5 and logs['kd.pkd.loss'].dtype == torch.float32
