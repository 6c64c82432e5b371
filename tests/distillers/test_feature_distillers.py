"""FeatureMimic, CWD and NFD on levels of any width and size, against NumPy in float64."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn

from kd_dense.connectors import Conv1x1
from kd_dense.context import Context
from kd_dense.distillers import CWD, NFD, FeatureMimic
from kd_dense.errors import ConfigError
from tests.helpers.toys import convolved, nothing_masked, probe, ready, resized

ROLE = 'features'


def levels(*shapes):
    return [torch.randn(*s, dtype=torch.float64) for s in shapes]


def call(method, student, teacher, context=None):
    losses = method({ROLE: student}, {ROLE: teacher}, context or nothing_masked())
    assert list(losses) == ['loss']
    return losses['loss']


STUDENT = [(2, 3, 8, 12), (2, 5, 4, 6)]
TEACHER = [(2, 4, 8, 12), (2, 5, 2, 3)]  # another width; another size


def aligned(method, student, teacher):
    """Connector by a sum over channels, teacher resized by the textbook."""
    for s, t, connector in zip(student, teacher, method.connectors, strict=True):
        s = s.detach().numpy() if isinstance(connector, nn.Identity) else convolved(s, connector)
        yield s, resized(t.numpy(), s.shape[2:])


def standardized(x):
    return (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5)


def channel_kl(s, t, temperature):
    p, q = (softmax(x.reshape(*x.shape[:2], -1) / temperature, axis=2) for x in (t, s))
    return temperature**2 * rel_entr(p, q).sum(2).mean()


METHODS = {
    'mimic': (lambda: FeatureMimic('neck'), lambda s, t: ((s - t) ** 2).mean(), np.mean),
    'mimic l1': (lambda: FeatureMimic('neck', loss='l1'), lambda s, t: abs(s - t).mean(), np.mean),
    'cwd': (lambda: CWD('neck', temperature=2), lambda s, t: channel_kl(s, t, 2), np.mean),
    'nfd': (lambda: NFD('neck'), lambda s, t: ((standardized(s) - standardized(t)) ** 2).mean(), np.sum),
}


@pytest.mark.parametrize('name', METHODS)
def test_value_equals_numpy(name):
    make, reference, combine = METHODS[name]
    student, teacher = levels(*STUDENT), levels(*TEACHER)
    method = ready(make(), ROLE, student, teacher)
    expected = combine([reference(s, t) for s, t in aligned(method, student, teacher)])
    # the teacher's resize is done in fp32
    assert call(method, student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('name', METHODS)
def test_every_parameter_and_the_student_get_a_gradient(name):
    student, teacher = levels(*STUDENT), levels(*TEACHER)
    method = ready(METHODS[name][0](), ROLE, student, teacher)
    student = [s.requires_grad_() for s in student]
    call(method, student, teacher).backward()
    assert all(s.grad.abs().sum() > 0 for s in student)
    grads = {n: p.grad for n, p in method.named_parameters()}
    assert grads
    for key, grad in grads.items():
        assert grad.abs().sum() > 1e-8, key


def test_connectors_are_there_only_where_widths_differ():
    student, teacher = levels(*STUDENT), levels(*TEACHER)
    for make, bias in (
        (lambda: FeatureMimic('neck'), True),
        (lambda: CWD('neck'), False),
        (lambda: NFD('neck'), False),
    ):
        first, second = ready(make(), ROLE, student, teacher).connectors
        assert type(first) is Conv1x1 and type(second) is nn.Identity
        assert (first.bias is not None) == bias
        assert first.weight.shape == (4, 3, 1, 1)
    both = ready(FeatureMimic('neck', connector='ConvReLUConv'), ROLE, student, teacher).connectors
    assert [sum(p.numel() for p in c.parameters()) for c in both] == [3 * 4 + 4 + 4 * 4 + 4, 2 * (5 * 5 + 5)]


@pytest.mark.parametrize('name', METHODS)
def test_padding_and_ignored_pixels_do_not_count(name):
    make, reference, combine = METHODS[name]
    student, teacher = levels((1, 3, 4, 6)), levels((1, 3, 4, 6))
    method = ready(make(), ROLE, student, teacher)
    labels = torch.zeros(1, 16, 24, dtype=torch.long)
    labels[:, :4] = 255  # the first of four rows of cells
    context = Context(canvas=(16, 24), image_sizes=torch.tensor([[16, 16]]), label_map=labels)  # four of six columns
    expected = combine([reference(student[0][:, :, 1:, :4].numpy(), teacher[0][:, :, 1:, :4].numpy())])
    assert call(method, student, teacher, context).item() == pytest.approx(expected, rel=1e-9)
    method.use_mask = False
    unmasked = combine([reference(student[0].numpy(), teacher[0].numpy())])
    assert call(method, student, teacher, context).item() == pytest.approx(unmasked, rel=1e-9)
    assert unmasked != pytest.approx(expected, rel=1e-3)


def test_use_mask_is_an_option():
    assert not any(m('neck', use_mask=False).use_mask for m in (FeatureMimic, CWD, NFD))


def test_tokens_and_vectors():
    for shape_s, shape_t in (((2, 7, 3), (2, 7, 4)), ((2, 3), (2, 4))):
        student, teacher = levels(shape_s), levels(shape_t)
        method = ready(FeatureMimic('backbone:3'), ROLE, student, teacher)
        (connector,) = method.connectors
        weight, bias = connector.weight.detach().numpy()[:, :, 0, 0], connector.bias.detach().numpy()
        expected = ((student[0].numpy() @ weight.T + bias - teacher[0].numpy()) ** 2).mean()
        # their places in the image are not known: no mask, whatever the batch says
        context = Context(canvas=(16, 24), image_sizes=torch.tensor([[8, 8], [16, 24]]))
        assert call(method, student, teacher, context).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    'student, teacher, message',
    [
        (
            [(1, 3, 8, 12)] * 3,
            [(1, 3, 8, 12)] * 2,
            r'student gives 3 tensors .*stride 2; .*but the teacher 2 .*NAME:INDEX',
        ),
        ([(1, 3, 8, 12)], [(1, 96, 3)], r'maps go with maps'),
        ([(1, 96, 3)], [(1, 24, 3)], r'\[B, 96, 3\].*\[B, 24, 3\].*tokens with as many tokens'),
    ],
)
@pytest.mark.parametrize('method', [FeatureMimic, CWD, NFD])
def test_shapes_that_do_not_go_together(method, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        method('neck').setup(probe(ROLE, *student), probe(ROLE, *teacher))


def test_wrong_number_of_levels_in_a_step_is_noticed():
    student, teacher = levels(*STUDENT), levels(*TEACHER)
    method = ready(FeatureMimic('neck'), ROLE, student, teacher)
    with pytest.raises(ValueError, match='zip'):
        call(method, student[:1], teacher)


def test_default_taps_and_weights():
    assert CWD().taps[ROLE].student == CWD().taps[ROLE].teacher == ('logits',)
    assert NFD().taps[ROLE].student == ('backbone:3',)
    pair = FeatureMimic(dict(student='backbone:2', teacher=['backbone:3'])).taps[ROLE]
    assert pair.student == ('backbone:2',) and pair.teacher == ('backbone:3',)
    assert (CWD().default_loss_weight, NFD().default_loss_weight, FeatureMimic('x').default_loss_weight) == (
        3.0,
        3.0,
        1.0,
    )


# -- properties of normalised feature distillation that belong to the distiller ----------------------------------------


def test_nfd_ignores_scale_and_offset_of_the_teacher():
    student, teacher = levels((2, 3, 8, 12)), levels((2, 3, 8, 12))
    method = ready(NFD('neck', eps=0), ROLE, student, teacher)
    value = call(method, student, teacher)
    torch.testing.assert_close(call(method, student, [5 * teacher[0] - 7]), value)
    torch.testing.assert_close(call(method, student, [-teacher[0]]), 4 - value)


def test_nfd_sums_over_layers():
    student, teacher = levels(*STUDENT), levels((2, 3, 8, 12), (2, 5, 4, 6))
    both = call(ready(NFD('neck'), ROLE, student, teacher), student, teacher)
    single = [call(ready(NFD('neck'), ROLE, [s], [t]), [s], [t]) for s, t in zip(student, teacher)]
    torch.testing.assert_close(both, sum(single))


@pytest.mark.parametrize('axes, dims', [('hw', (2, 3)), ('c', (1,)), ('chw', (1, 2, 3)), ('bhw', (0, 2, 3))])
def test_nfd_axes(axes, dims):
    student, teacher = levels((2, 3, 8, 12)), levels((2, 3, 8, 12))

    def bar(x):
        x = x.numpy()
        return (x - x.mean(dims, keepdims=True)) / np.sqrt(x.var(dims, keepdims=True) + 1e-3)

    method = ready(NFD('neck', axes=axes, eps=1e-3), ROLE, student, teacher)
    expected = ((bar(student[0]) - bar(teacher[0])) ** 2).mean()
    assert call(method, student, teacher).item() == pytest.approx(expected, rel=1e-9)
