"""MGD against NumPy in float64, its random masks, and on real models."""

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.distillers import MGD
from kd_dense.errors import ConfigError
from kd_dense.random_state import step_seed
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.toys import convolved, nothing_masked, probe, ready

ROLE = 'features'
STUDENT, TEACHER = [(2, 3, 8, 8), (2, 4, 4, 4)], [(2, 4, 8, 8), (2, 4, 4, 4)]


def maps(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def loss(method, student, teacher, context=None):
    losses = method({ROLE: student}, {ROLE: teacher}, context or nothing_masked())
    assert list(losses) == ['loss']
    return losses['loss']


def mgd(student, teacher, **options):
    return ready(MGD(**options), ROLE, student, teacher)


def generator_of(iteration, seed=0):
    return torch.Generator().manual_seed(step_seed(seed, iteration))


def convolved_3x3(x, conv):
    """By sums over channels and shifts."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    h, w = x.shape[2:]
    out = bias[:, None, None] * np.ones((len(x), len(bias), h, w))
    for i in range(3):
        for j in range(3):
            out += np.einsum('oc,bchw->bohw', weight[:, :, i, j], padded[:, :, i : i + h, j : j + w])
    return out


def reference(method, student, teacher, ratio, masks=None):
    """Squares, level by level; the positions are drawn again from the seed of iteration 0."""
    random = generator_of(0)
    totals = []
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        align, generator = method.connectors[level], method.generators[level]
        x = s.detach().numpy() if isinstance(align, nn.Identity) else convolved(s, align)
        drawn = torch.rand(len(x), 1, *x.shape[2:], generator=random).numpy()
        kept = (drawn >= ratio) | (drawn == drawn.max((2, 3), keepdims=True))
        x = convolved_3x3(np.maximum(convolved_3x3(x * kept, generator[0]), 0), generator[2])
        error = (x - t.numpy()) ** 2
        totals.append(error if masks is None else error * masks[level])
    return totals


@pytest.mark.parametrize('ratio', [0.0, 0.45, 0.65])
def test_value_equals_numpy(ratio):
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    method = mgd(student, teacher, mask_ratio=ratio)
    errors = reference(method, student, teacher, ratio)
    assert loss(method, student, teacher).item() == pytest.approx(sum(e.sum() for e in errors) / 2, rel=1e-6)
    method.reduction = 'mean'
    assert loss(method, student, teacher).item() == pytest.approx(sum(e.mean() for e in errors), rel=1e-6)


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_padding_does_not_count(reduction):
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    method = mgd(student, teacher, reduction=reduction)
    context = Context((64, 64), torch.tensor([[64, 40], [48, 64]]))
    masks = [context.mask(s.shape[2:]).numpy() for s in student]
    assert [m.sum() for m in masks] == [8 * 5 + 6 * 8, 4 * 2 + 3 * 4]
    errors = reference(method, student, teacher, 0.65, masks)
    counts = [m.sum() * e.shape[1] for m, e in zip(masks, errors, strict=True)]
    expected = sum(e.sum() / (2 if reduction == 'sum' else n) for e, n in zip(errors, counts, strict=True))
    assert loss(method, student, teacher, context).item() == pytest.approx(expected, rel=1e-6)


def test_masks_are_drawn_anew_for_each_image_and_step_with_the_stated_ratio():
    student, teacher = maps((2, 4, 64, 64)), maps((2, 4, 64, 64))
    method = mgd(student, teacher, mask_ratio=0.65)
    seen = []
    method.generators[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for iteration in (0, 1):
        loss(method, student, teacher, Context((16, 24), iteration=iteration))
    kept = [x != 0 for x in seen]
    for x in kept:
        assert (x == x[:, :1]).all()  # the same for all channels
        assert x.double().mean().item() == pytest.approx(0.35, abs=4 * (0.65 * 0.35 / (2 * 64 * 64)) ** 0.5)
    assert not torch.equal(kept[0][0], kept[0][1]) and not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(seen[0], student[0] * kept[0])


def test_a_map_of_one_cell_is_never_erased():
    """The coarsest levels of small images would else leave their connector without a gradient in half of the steps."""
    student, teacher = maps((2, 4, 1, 1)), maps((2, 4, 1, 1))
    method = mgd(student, teacher, mask_ratio=0.99)
    for iteration in range(5):
        student[0].grad = None
        context = Context((16, 24), iteration=iteration)
        loss(method, [student[0].requires_grad_()], teacher, context).backward()
        assert (student[0].grad.flatten(1) != 0).any(1).all()


def test_the_iteration_and_the_seed_decide_and_the_random_state_is_left_alone():
    """A run that is resumed draws what it would have drawn, and the student draws what it draws without a teacher."""
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    method, state = mgd(student, teacher), torch.get_rng_state()
    values = [loss(method, student, teacher, Context((16, 24), iteration=i)).item() for i in (0, 1, 2, 1)]
    assert len(set(values)) == 3 and values[1] == values[3]
    assert torch.equal(torch.get_rng_state(), state)
    method.seed = 1
    assert loss(method, student, teacher).item() != values[0]


def test_erased_positions_get_no_gradient():
    student, teacher = maps((2, 4, 8, 8)), maps((2, 4, 8, 8))
    method = mgd(student, teacher)
    student[0].requires_grad_()
    kept = torch.rand(2, 1, 8, 8, generator=generator_of(0)) >= 0.65
    teacher[0].requires_grad_()
    loss(method, student, teacher).backward()
    assert (student[0].grad[~kept.expand(2, 4, 8, 8)] == 0).all() and (
        student[0].grad[kept.expand(2, 4, 8, 8)] != 0
    ).all()
    assert teacher[0].grad is None
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_gradcheck():
    student, teacher = maps((1, 2, 3, 4)), maps((1, 2, 3, 4))
    method = mgd(student, teacher)
    assert torch.autograd.gradcheck(lambda s: loss(method, [s], teacher), student[0].requires_grad_())


def test_half_precision_is_reduced_in_fp32():
    student, teacher = ([x.bfloat16() for x in maps(*shapes)] for shapes in (STUDENT, TEACHER))
    method = mgd(student, teacher).float()
    with torch.autocast('cpu', torch.bfloat16):
        value = loss(method, student, teacher)
    exact = loss(method.double(), [s.double() for s in student], [t.double() for t in teacher])
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=2e-2)


def test_masks_are_drawn_on_the_device():
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    method, context = mgd(student, teacher), Context((64, 64), torch.tensor([[64, 40], [48, 64]]))
    with Operations() as operations:
        loss(method, [s.requires_grad_() for s in student], teacher, context).backward()
    assert operations.seen == [] and operations.uploads == [] and operations.counts['rand'] == 2


def test_parameters():
    student, teacher = maps(*STUDENT), maps(*TEACHER)
    sizes = {n: p.shape for n, p in mgd(student, teacher).named_parameters()}
    assert sum(n.startswith('generators') for n in sizes) == 2 * 2 * 2
    assert sizes['connectors.0.weight'] == (4, 3, 1, 1) and sizes['generators.1.2.weight'] == (4, 4, 3, 3)


def test_defaults():
    assert MGD().taps[ROLE].student == ('neck',) and MGD().mask_ratio == 0.65
    assert MGD().default_loss_weight == MGD.default_loss_weight == 2e-5
    assert MGD(reduction='mean').default_loss_weight == 1.0 and not MGD.needs_boxes


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(mask_ratio=1), 'mask_ratio must lie in 0..1, 1 excluded, not 1'),
        (dict(mask_ratio=-0.1), 'mask_ratio must lie in 0..1, 1 excluded, not -0.1'),
        (dict(reduction='max'), r"reduction must be one of \['sum', 'mean'\], not 'max'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MGD(**options)


def test_tokens_have_no_neighbours():
    with pytest.raises(ConfigError, match=r'MGD needs maps \[B, C, h, w\], not features: \[B, 64, 3\]'):
        MGD().setup(probe(ROLE, (1, 64, 3)), probe(ROLE, (1, 64, 3)))


@pytest.mark.parametrize(
    'kind, options, amp',
    [
        ('RetinaNet', dict(), False),
        ('RetinaNet', dict(reduction='mean'), True),
        ('FasterRCNN', dict(mask_ratio=0.45, loss_weight=5e-7), False),
        ('segmentor', dict(taps='backbone:3', mask_ratio=0.75), False),
    ],
)
def test_takes_a_step_in_a_model(kind, options, amp):
    from kd_dense.models.build import build_model

    make = (lambda width: tiny.segmentor(width)) if kind == 'segmentor' else lambda width: tiny.detector(kind, width)
    batch = tiny.segmentation_batch() if kind == 'segmentor' else tiny.detection_batch()
    teacher = build_model(make(8), 'teacher')
    model = Distillation(make(4), teacher, dict(mgd=dict(type='MGD', **options)))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        logs = model.train().train_step(batch, wrapper)
    model.distillers.verify_gradients()
    assert 0 < logs['kd.mgd.loss'].item() < float('inf') and logs['kd.mgd.loss'].dtype == torch.float32
