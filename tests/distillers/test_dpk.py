"""Dynamic prior knowledge: how much of the teacher goes in, which tokens, what is compared, and what is kept.

Worked numbers of the alignment are in tests/losses/test_cka.py, the reconstruction in tests/connectors/test_dpk.py.
"""

import copy
import math

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from kd_dense import Distillation
from kd_dense.context import Context
from kd_dense.distillers import DPK
from kd_dense.errors import ConfigError
from tests.helpers import tiny
from tests.helpers.dispatch import Operations
from tests.helpers.toys import nothing_masked, probe
from tests.matrix.test_distributed import two_processes

ROLE = 'features'
CANVAS = (64, 96)
SMALL = dict(width=16, depth=(1, 1), heads=2)


def dpk(student, teacher, canvas=CANVAS, **options):
    method = DPK(**SMALL | options)
    method.setup(*(probe(ROLE, *(tuple(x.shape) for x in side), canvas=canvas) for side in (student, teacher)))
    return method.to(student[0].dtype)


def loss(method, student, teacher, context=None):
    losses = method({ROLE: student}, {ROLE: teacher}, context or nothing_masked(CANVAS))
    assert list(losses) == ['loss']
    return losses['loss']


def maps(student=3, teacher=5, size=(8, 12), batch=2):
    return [torch.randn(batch, student, *size)], [torch.randn(batch, teacher, *size)]


def identity(method):
    """Without norms, codes, encoder and decoder: what goes in comes out, one token for each cell."""
    (connector,) = method.connectors
    for name in ('ln_student', 'ln_teacher', 'embed_student', 'embed_teacher', 'ln_out', 'output'):
        setattr(connector, name, nn.Identity())
    connector.position = lambda x: 0
    return method


def plain(student, teacher, ratio, **options):
    """``identity`` with a share that is set by hand."""
    return identity(
        dpk(student, teacher, depth=(0, 0), width=8, patch=1, target_norm=False, fixed_ratio=ratio, **options)
    )


def drawn(method, count=2, grid=(8, 12), tokens=None, seed=0):
    return method._draw(0, count, grid, tokens, torch.Generator().manual_seed(seed))


# -- how much ----------------------------------------------------------------------------------------------------------


def aligned(share, cells=4096, width=6):
    """Maps ``[1, 6, 64, 64]`` of whose channels the first are alike; CKA is known for independent unit channels.

    With ``K = A A' + B B'`` and ``L = A A' + C C'`` of independent parts, HSIC(K, L) / HSIC(K, K) is the share of equal
    channels.
    """
    x, y = torch.randn(cells, width), torch.randn(cells, width)
    y[:, :share] = x[:, :share]
    return tuple(v.T.reshape(1, width, 64, 64).contiguous() for v in (x, y))


@pytest.mark.parametrize('share', [0, 3, 6])
def test_the_share_is_one_minus_the_alignment(share):
    s, t = aligned(share)
    method = dpk([s], [t], canvas=(64, 64), ratio_ema=0.0, samples=1024)
    loss(method, [s], [t], Context((64, 64)))
    assert method.ratios.item() == pytest.approx(1 - share / 6, abs=0.05)
    if share == 6:
        assert method.ratios.item() == pytest.approx(0, abs=1e-6)


def test_worked_share_of_four_examples():
    """X = (1,0), (0,1), (-1,0), (0,-1) and Y = 1, 1, -1, -1 have a CKA of 1/2; opposite ones -0.69, clipped."""
    x = torch.tensor([(1.0, 0), (0, 1), (-1, 0), (0, -1)]).T.reshape(1, 2, 2, 2).contiguous()
    y = torch.tensor([1.0, 1, -1, -1]).reshape(1, 1, 2, 2)
    options = dict(canvas=(16, 16), min_samples=4, patch=1)
    for ema, limit, expected in ((0.0, 1.0, 0.5), (0.9, 1.0, 0.5), (0.0, 0.3, 0.3), (0.5, 0.3, 0.4)):
        method = dpk([x], [y], ratio_ema=ema, max_ratio=limit, **options)
        loss(method, [x], [y], Context((16, 16)))
        assert method.ratios.item() == pytest.approx(expected, abs=1e-6)
    line = torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 2, 2)
    ends = torch.tensor([1.0, 0, 0, 1]).reshape(1, 1, 2, 2)
    method = dpk([line], [ends], ratio_ema=0.8, **options)
    for expected in (0.6, 0.68, 0.744):  # 0.8 r + 0.2 * 1
        loss(method, [line], [ends], Context((16, 16)))
        assert method.ratios.item() == pytest.approx(expected, abs=1e-6)


def test_images_as_examples():
    x = torch.tensor([(1.0, 0), (0, 1), (-1, 0), (0, -1)])[:, :, None, None].expand(4, 2, 1, 2).contiguous()
    y = torch.tensor([1.0, 1, -1, -1]).reshape(4, 1, 1, 1).expand(4, 1, 1, 2).contiguous()
    method = dpk([x], [y], canvas=(16, 32), examples='images', ratio_ema=0.0, patch=1)
    loss(method, [x], [y], Context((16, 32)))
    assert method.ratios.item() == pytest.approx(0.5, abs=1e-6)


def test_what_can_not_be_estimated_leaves_the_share_as_it_was():
    student, teacher = maps(size=(4, 6))  # 48 cells
    method = dpk(student, teacher, ratio_ema=0.5)
    loss(method, student, teacher)
    assert method.ratios.item() == 0.5  # fewer than 64
    few = Context(CANVAS, image_sizes=torch.tensor([[64, 96], [16, 32]]))
    for least, moves in ((26, True), (27, False)):  # 24 + 2 cells count
        method = dpk(student, teacher, min_samples=least)
        loss(method, student, teacher, few)
        assert (method.ratios.item() != 0.5) == moves
    method = dpk(student, teacher, min_samples=4)
    for constant in (torch.ones_like(student[0]), torch.full_like(student[0], torch.nan)):
        loss(method, [constant], teacher)
        assert method.ratios.item() == 0.5
    loss(method, student, teacher)
    assert method.ratios.item() != 0.5


def test_padding_takes_no_part():
    """Cells beyond the image are drawn neither for the alignment nor for the mixture, and are not compared."""
    student, teacher = maps(4, 4)
    teacher[0][:, :, :5] = student[0][:, :, :5]
    for x in (student[0], teacher[0]):
        x[:, :, 5:] = torch.randn(2, 4, 3, 12) * 1000
    context = Context(CANVAS, image_sizes=torch.tensor([[40, 96], [40, 96]]))
    method = dpk(student, teacher, ratio_ema=0.0, patch=1)
    value = loss(method, student, teacher, context)
    assert method.ratios.item() == pytest.approx(0, abs=1e-5)
    student[0][:, :, 5:], teacher[0][:, :, 5:] = 5.0, torch.randn(2, 4, 3, 12)
    assert loss(method, student, teacher, context).item() == pytest.approx(value.item(), rel=1e-5)


def test_cells_of_one_image_and_place_go_together():
    """A teacher that is a rotation of the student in each cell has alignment 1 only if the cells are paired."""
    student = [torch.randn(3, 4, 8, 12)]
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    teacher = [torch.einsum('oc,bchw->bohw', rotation, student[0]) * 3 + 1]
    method = dpk(student, teacher, ratio_ema=0.0, samples=100)
    loss(method, student, teacher)
    assert method.ratios.item() == pytest.approx(0, abs=1e-5)
    loss(method, student, [teacher[0].roll(1, 0)])
    assert method.ratios.item() > 0.8


# -- which tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [0.0, 0.1, 0.37, 0.5, 0.8, 0.999])
def test_the_number_of_tokens_is_exact(ratio):
    student, teacher = maps()
    method = dpk(student, teacher, fixed_ratio=ratio)
    replaced, full = drawn(method, 5)
    assert (replaced.sum(1) == round(ratio * 96)).all() and full.item() == (round(ratio * 96) == 96)
    assert ratio in (0.0, 0.999) or not torch.equal(replaced[0], replaced[1])  # a set for each image
    tokens = torch.zeros(3, 8, 12, dtype=torch.bool)
    tokens[0], tokens[1, :5, :7] = True, True
    replaced, _ = drawn(method, 3, tokens=tokens.flatten(1))
    assert replaced.sum(1).tolist() == [round(ratio * n) for n in (96, 35, 0)]
    assert not (replaced & ~tokens.flatten(1)).any()
    shared, _ = drawn(dpk(student, teacher, fixed_ratio=ratio, shared_mask=True), 5)
    assert (shared == shared[0]).all() and shared[0].sum() == round(ratio * 96)


def test_tokens_are_equally_likely():
    student, teacher = maps()
    method = dpk(student, teacher, fixed_ratio=0.3)
    share = drawn(method, 4000)[0].double().mean(0)
    exact = round(0.3 * 96) / 96
    assert (share - exact).abs().max() < 4.5 * math.sqrt(exact * (1 - exact) / 4000)


def test_draws_follow_from_seed_and_iteration_and_leave_the_random_state_alone():
    student, teacher = maps()
    method = dpk(student, teacher, min_samples=4, samples=20)
    state = copy.deepcopy(method.state_dict())
    before = torch.get_rng_state()

    def run(iteration, seed=0):
        method.load_state_dict(state)
        method.seed = seed
        value = loss(method, student, teacher, Context(CANVAS, iteration=iteration)).item()
        return value, method.ratios.item()

    first = run(5)
    assert run(5) == first and torch.equal(torch.get_rng_state(), before)
    others = [run(6), run(5, seed=1)]
    assert all(value != first[0] and ratio != first[1] for value, ratio in others)


def test_tokens_have_a_size_in_pixels():
    strides = (4, 8, 16, 32, 64)
    levels = [torch.randn(1, 3, 256 // n, 256 // n) for n in strides]
    for options, expected in (
        (dict(), [8, 4, 2, 1, 1]),
        (dict(token_size=16), [4, 2, 1, 1, 1]),
        (dict(patch=2), [2] * 5),
        (dict(patch=[5, 4, 3, 2, 1]), [5, 4, 3, 2, 1]),
    ):
        method = dpk(levels, levels, canvas=(256, 256), **options)
        assert [c.patch for c in method.connectors] == expected
    assert dpk(levels, levels, canvas=(256, 256)).connectors[0].grid((200, 336)) == (25, 42)


# -- what is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.99])
def test_equal_maps_through_nothing_have_no_loss(ratio):
    x = [torch.randn(2, 8, 8, 12)]
    method = plain(x, x, ratio)
    assert loss(method, x, [x[0].clone()]).item() == 0


@pytest.mark.parametrize('ratio', [0.0, 0.25, 0.6, 0.99])
def test_only_tokens_of_the_student_differ(ratio):
    teacher = [torch.randn(2, 8, 8, 12, dtype=torch.float64)]
    student = [teacher[0] + 0.5 * torch.arange(8, dtype=torch.float64)[:, None, None]]  # the same in every cell
    whole = ((student[0] - teacher[0]) ** 2).mean().item()
    share = 1 - round(ratio * 96) / 96
    assert loss(plain(student, teacher, ratio), student, teacher).item() == pytest.approx(share * whole, rel=1e-12)
    own = loss(plain(student, teacher, ratio, region='student_only'), student, teacher).item()
    assert own == pytest.approx(whole if share else 0, rel=1e-12)


def test_region_of_the_student_covers_the_patches_of_its_tokens():
    student, teacher = maps(size=(7, 10))  # cut through patches of 4
    method = dpk(student, teacher, patch=4, fixed_ratio=0.5, region='student_only', target_norm=False)
    (connector,) = method.connectors
    seen = {}
    forward = connector.forward

    def note(s, t, replaced, mask):
        seen['replaced'], seen['out'] = replaced, forward(s, t, replaced, mask)
        return seen['out']

    connector.forward = note
    context = Context(CANVAS, image_sizes=torch.tensor([[64, 96], [30, 96]]))
    value = loss(method, student, teacher, context).item()
    kept, mask = [], context.mask((7, 10))
    for b in range(2):
        for i in range(7):
            for j in range(10):
                if mask[b, 0, i, j] and not seen['replaced'][b, (i // 4) * 3 + j // 4]:
                    kept.append(((seen['out'][b, :, i, j] - teacher[0][b, :, i, j]) ** 2).mean().item())
    assert value == pytest.approx(np.mean(kept), rel=1e-5) and 0 < len(kept) < mask.sum()


def test_the_target_is_normalised_over_its_channels():
    student, teacher = maps()
    method = dpk(student, teacher, fixed_ratio=0.5)
    t = teacher[0].double().numpy()
    expected = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(method.target(teacher[0]).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert method.target(teacher[0].bfloat16()).dtype == torch.float32
    assert dpk(student, teacher, target_norm=False).target(teacher[0]) is teacher[0]


def test_levels_are_summed_and_the_teacher_is_resized():
    student = [torch.randn(2, c, 8 // n, 12 // n) for c, n in ((3, 1), (4, 2))]
    teacher = [torch.randn(2, 5, 8 // n, 12 // n) for n in (1, 2)]
    method = dpk(student, teacher, fixed_ratio=0.5)
    value = loss(method, student, teacher).item()
    generator = torch.Generator().manual_seed(0)
    parts = [method._level(i, s, t, None, generator).item() for i, (s, t) in enumerate(zip(student, teacher))]
    assert min(parts) > 0.5 and value == pytest.approx(sum(parts), rel=0.05)  # other tokens, and nothing is trained
    large = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in teacher]
    assert loss(method, student, large).item() == pytest.approx(value, rel=1e-4)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stitch', ['before_encoder', 'after_encoder'])
def test_without_tokens_of_one_side_that_side_gets_no_gradient(stitch):
    student, teacher = maps()
    student[0].requires_grad_()
    for ratio, dead, alive in ((1.0, 'student', 'teacher'), (0.0, 'teacher', 'student')):
        method = dpk(student, teacher, fixed_ratio=0.5, stitch=stitch)
        method.ratios.fill_(ratio)
        student[0].grad = None
        loss(method, student, teacher).backward()
        (connector,) = method.connectors
        assert all((p.grad == 0).all() for p in connector.side(dead))
        assert all(p.grad.abs().sum() > 0 for p in connector.side(alive))
        assert (student[0].grad == 0).all() == (ratio == 1)
        assert method.saturated.item() == (ratio == 1)


def test_no_gradient_reaches_the_teacher_or_the_share():
    student, teacher = maps()
    student[0].requires_grad_(), teacher[0].requires_grad_()
    method = dpk(student, teacher)
    loss(method, student, teacher).backward()
    assert student[0].grad.abs().sum() > 0 and teacher[0].grad is None
    assert not method.ratios.requires_grad and 'ratios' not in dict(method.named_parameters())


def test_an_image_that_is_ignored_altogether_has_no_loss():
    student, teacher = maps()
    student[0].requires_grad_()
    labels = torch.full((2, *CANVAS), 255)
    for region in ('all', 'student_only'):
        method = dpk(student, teacher, region=region)
        value = loss(method, student, teacher, Context(CANVAS, label_map=labels))
        value.backward()
        assert value.item() == 0 and (student[0].grad == 0).all() and method.ratios.item() == 0.5
    labels[0] = 1
    student[0].grad = None
    loss(method, student, teacher, Context(CANVAS, label_map=labels)).backward()
    assert student[0].grad[0].abs().sum() > 0 and (student[0].grad[1] == 0).all()


def test_the_share_falls_while_the_student_learns():
    """A student that is trained towards a fixed teacher needs less and less of it."""
    torch.manual_seed(1)
    features = torch.randn(4, 12, 8, 12)
    target = nn.Conv2d(12, 6, 1).requires_grad_(False)
    student = nn.Conv2d(12, 6, 1)
    teacher = [target(features)]
    nn.init.normal_(student.weight[:, :6], std=0.01)
    method = dpk([student(features)], teacher, patch=2, ratio_ema=0.5)
    optimizer = torch.optim.Adam([*student.parameters(), *method.parameters()], lr=0.02)
    shares, losses = [], []
    for iteration in range(80):
        value = loss(method, [student(features)], teacher, Context(CANVAS, iteration=iteration))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        shares.append(method.ratios.item())
        losses.append(value.item())
    quarters = [np.mean(shares[i : i + 20]) for i in range(0, 80, 20)]
    assert quarters[-1] < quarters[1] and quarters[-1] < 0.8 * quarters[0]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


# -- state, cost, processes --------------------------------------------------------------------------------------------


def test_shares_are_part_of_the_distillation_state():
    student, teacher = maps()
    method = dpk(student, teacher)
    for i in range(3):
        loss(method, student, teacher, Context(CANVAS, iteration=i))
    resumed = dpk(student, teacher)
    resumed.load_state_dict(method.state_dict())
    assert resumed.ratios.item() == method.ratios.item() != 0.5
    context = Context(CANVAS, iteration=3)
    assert loss(resumed, student, teacher, context).item() == loss(method, student, teacher, context).item()
    assert resumed.ratios.item() == method.ratios.item()


@pytest.mark.parametrize('examples', ['cells', 'images'])
@pytest.mark.parametrize('region', ['all', 'student_only'])
def test_nothing_waits_for_the_device(region, examples):
    student, teacher = maps(batch=4)
    method = dpk(student, [torch.randn(4, 5, 16, 24)], region=region, examples=examples)
    context = Context(CANVAS, image_sizes=torch.tensor([[64, 96], [48, 96], [64, 80], [64, 96]]))
    for given in (context, nothing_masked(CANVAS)):
        with Operations() as operations:
            loss(method, [student[0].clone().requires_grad_()], teacher, given).backward()
        assert operations.seen == [] and operations.uploads == []


def _shares(rank, world):
    torch.manual_seed(5)
    x, y = torch.randn(8, 2, 1, 1), torch.randn(8, 3, 1, 1)
    own = slice(None) if world == 1 else slice(4 * rank, 4 * rank + 4)
    method = dpk([x[own]], [y[own]], canvas=(16, 16), examples='images', ratio_ema=0.0, patch=1)
    loss(method, [x[own]], [y[own]], Context((16, 16)))
    return method.ratios


def test_processes_have_one_share(tmp_path):
    """That of both minibatches, whose terms are added up."""
    from kd_dense.losses.cka import cka, hsic_terms

    torch.manual_seed(5)
    x, y = torch.randn(8, 2), torch.randn(8, 3)
    expected = 1 - cka(hsic_terms(x[:4], y[:4]) + hsic_terms(x[4:], y[4:]))
    for ratios in two_processes(_shares, tmp_path):
        torch.testing.assert_close(ratios, expected.clamp(0, 1).nan_to_num(0.5).float()[None])
    assert 0 < expected < 1


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(region='teacher'), "region must be one of .*'student_only'.*not 'teacher'"),
        (dict(examples='pixels'), "examples must be one of .*'cells'.*not 'pixels'"),
        (dict(ratio_ema=1.0), 'ratio_ema must lie in 0..1, 1 excluded, not 1.0'),
        (dict(fixed_ratio=1), 'fixed_ratio must lie in 0..1, 1 excluded, not 1'),
        (dict(initial_ratio=-0.1), 'initial_ratio must lie in 0..1, not -0.1'),
        (dict(max_ratio=2), 'max_ratio must lie in 0..1, not 2'),
        (dict(token_size=0), 'token_size must be a whole number >= 1, not 0'),
        (dict(min_samples=3), 'min_samples must be a whole number >= 4, not 3'),
        (dict(samples=2.5), 'samples must be a whole number >= 4, not 2.5'),
        (dict(depth=(1,)), 'depth: needs two whole numbers >= 0'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DPK(**options)


def test_what_is_found_out_in_the_setup():
    student, teacher = maps()
    tokens = [torch.randn(2, 6, 4)]
    with pytest.raises(ConfigError, match=r'DPK takes maps .*features: \[B, 6, 4\] \(student\)'):
        dpk(tokens, tokens)
    with pytest.raises(
        ConfigError, match=r'patch: needs a whole number >= 1, or one for each of 1 levels, not \[1, 2\]'
    ):
        dpk(student, teacher, patch=[1, 2])
    with pytest.raises(ConfigError, match='width: 18 must be a multiple of 4'):
        dpk(student, teacher, width=18)


# -- on real models ----------------------------------------------------------------------------------------------------


def trained(student, teacher, options, batch, amp=False, steps=1):
    from kd_dense.models.build import build_model

    model = Distillation(student, build_model(teacher, 'teacher'), dict(prior=dict(type='DPK', **SMALL | options)))
    model.progress = 0.0
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    for model.iteration in range(steps):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            logs = model.train().train_step(batch, wrapper)
        model.distillers.verify_gradients()
    state = model.distillation_state()
    assert {'methods.prior.ratios', 'methods.prior.saturated'} <= set(state)
    assert not any('prior' in name for name in model.state_dict())
    return logs['kd.prior.loss'], state['methods.prior.ratios']


@pytest.mark.parametrize(('kind', 'amp'), [('RetinaNet', False), ('RetinaNet', True), ('FasterRCNN', False)])
def test_detectors_take_a_step(kind, amp):
    """All five levels, the last of which have one token; the two images differ in size, so one is padded."""
    value, ratios = trained(
        tiny.detector(kind, 4), tiny.detector(kind, 8), {}, tiny.detection_batch(((160, 160), (128, 160))), amp
    )
    assert 0 < value < 10 and value.dtype == torch.float32
    assert len(ratios) == 5 and (ratios != 0.5).sum() >= 2 and (ratios > 0).all() and (ratios <= 0.55).all()


@pytest.mark.parametrize(
    'options', [dict(ratio_ema=0.0, min_samples=4), dict(fixed_ratio=0.0), dict(stitch='after_encoder')]
)
def test_segmentors_take_a_step(options):
    options = dict(taps=['backbone:1', 'backbone:2', 'backbone:3'], token_size=16, **options)
    value, _ = trained(tiny.segmentor(4), tiny.segmentor(8), options, tiny.segmentation_batch(), steps=2)
    assert 0 < value < 10
