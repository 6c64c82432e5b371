"""The terms of SSDA-YOLO on worked numbers."""

import math

import pytest
import torch

from kd_dense.errors import ConfigError
from kd_dense.losses.adaptation import ssda_terms, style_consistency


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_official_worked_numbers():
    source, styled, pseudo = scalar(3.0), scalar(2.5), scalar(4.0)
    terms = ssda_terms(source, styled, pseudo, behaviour='official')
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        dict(source_loss=3.0, styled_loss=2.5, pseudo_loss=0.02, consistency_loss=0.5)
    )
    terms['consistency_loss'].backward(retain_graph=True)
    assert (source.grad.item(), styled.grad.item()) == (2.0, -2.0)
    for x in (source, styled, pseudo):
        x.grad = None
    sum(terms.values()).backward()
    # above a difference of 1 / (2 alpha) the student is made worse on styled images
    assert (source.grad.item(), styled.grad.item()) == (3.0, -1.0)
    assert pseudo.grad.item() == pytest.approx(0.005)


def test_fixed_worked_numbers():
    source, styled = scalar(3.0), scalar(2.5)
    terms = ssda_terms(source, styled, None)
    assert terms['consistency_loss'].item() == pytest.approx(1.1 * 0.25 / 2.75)
    assert terms['pseudo_loss'].item() == 0
    terms['consistency_loss'].backward()
    expected = 1.1 * 2 * 0.5 / 2.75  # the mean is a constant
    assert (source.grad.item(), styled.grad.item()) == pytest.approx((expected, -expected))


def test_both_agree_at_the_scale_of_the_published_run():
    """Sums over six images of a loss of about 0.091, from which the weight of the relative form comes."""
    mean = 6 * 0.091
    source, styled = scalar(mean + 0.05), scalar(mean - 0.05)
    official, fixed = (ssda_terms(source, styled, None, behaviour=b)['consistency_loss'] for b in ('official', 'fixed'))
    assert fixed.item() == pytest.approx(official.item(), rel=0.01)


def test_relative_form_has_the_scale_of_the_loss():
    value = style_consistency(scalar(3.0), scalar(2.0))
    assert style_consistency(scalar(30.0), scalar(20.0)).item() == pytest.approx(10 * value.item())
    absolute = style_consistency(scalar(3.0), scalar(2.0), relative=False)
    assert style_consistency(scalar(30.0), scalar(20.0), relative=False).item() == pytest.approx(100 * absolute.item())


@pytest.mark.parametrize('behaviour', ['fixed', 'official'])
@pytest.mark.parametrize('value', [0.0, 2.5])
def test_equal_losses_give_exactly_nothing(behaviour, value):
    source, styled = scalar(value), scalar(value)
    loss = ssda_terms(source, styled, None, behaviour=behaviour)['consistency_loss']
    loss.backward()
    assert loss == 0 and source.grad == 0 and styled.grad == 0


def test_without_weights_and_with_identical_pairs_it_is_twice_the_supervised_gradient():
    w = scalar(1.5)
    loss = (w**2 - 3).square()
    terms = ssda_terms(loss, loss, loss, pseudo_weight=0, consistency_weight=0)
    (gradient,) = torch.autograd.grad(sum(terms.values()), w, retain_graph=True)
    (single,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(gradient, 2 * single)


@pytest.mark.parametrize('behaviour', ['fixed', 'official'])
def test_weights_are_factors(behaviour):
    source, styled, pseudo = scalar(3.0), scalar(2.5), scalar(4.0)
    a = ssda_terms(source, styled, pseudo, 0.1, 1.0, behaviour)
    b = ssda_terms(source, styled, pseudo, 0.3, 5.0, behaviour)
    assert b['pseudo_loss'].item() == pytest.approx(3 * a['pseudo_loss'].item())
    assert b['consistency_loss'].item() == pytest.approx(5 * a['consistency_loss'].item())
    assert a['pseudo_loss'].item() == pytest.approx(0.4)


def test_gradcheck_of_the_absolute_form():
    assert torch.autograd.gradcheck(lambda a, b: style_consistency(a, b, relative=False), (scalar(3.0), scalar(1.0)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_squared_in_fp32(dtype):
    source, styled = scalar(400.0, dtype), scalar(100.0, dtype)
    for relative, expected in ((False, 9e4), (True, 9e4 / 250)):  # 9e4 is beyond fp16
        value = style_consistency(source, styled, relative)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected)
        value.backward()
        assert math.isfinite(source.grad.item())


def test_without_styled_images():
    terms = ssda_terms(scalar(3.0), None, scalar(4.0), pseudo_weight=0.5)
    assert {k: v.item() for k, v in terms.items()} == dict(source_loss=3.0, pseudo_loss=2.0)


def test_wrong_behaviour():
    with pytest.raises(ConfigError, match="unknown behaviour 'oficial'; did you mean 'official'"):
        ssda_terms(scalar(1.0), scalar(1.0), None, behaviour='oficial')
