"""Batch norms folded into convolutions: which pairs are exact, and that the numbers stay what they were."""

import copy

import pytest
import torch
from torch import nn

from kd_dense.folding import Watch
from tests.helpers.dispatch import Operations


def lived_in(model: nn.Module) -> nn.Module:
    """``model`` with statistics and weights of norms as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 3 + 0.1)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval().requires_grad_(False)


class StandardisedConv(nn.Conv2d):
    """Not what its weight says."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Net(nn.Module):
    """Convolutions before norms in every relation; ``pairs`` of them can be folded."""

    pairs = [('plain', 'n_plain'), ('grouped', 'n_grouped'), ('late', 'n_late')]

    def __init__(self) -> None:
        super().__init__()
        self.n_late = nn.BatchNorm2d(4, affine=False)  # registered before everything, run last
        self.plain, self.n_plain = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=0.1)
        self.grouped = nn.Conv2d(4, 4, 3, 1, 1, groups=2, bias=False, padding_mode='reflect')
        self.n_grouped = nn.SyncBatchNorm(4)
        self.skipped, self.n_skipped = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.n_first, self.n_second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.between, self.n_between = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.n_again = nn.BatchNorm2d(4)
        self.other = StandardisedConv(4, 4, 1)
        self.n_other = nn.BatchNorm2d(4)
        self.batch = nn.Conv2d(4, 4, 1)
        self.n_batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.late = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.n_plain(self.plain(x)).relu_()
        x = self.n_grouped(self.grouped(x)).relu_()
        y = self.skipped(x)
        x = self.n_skipped(y) + y  # the convolution's own output is needed too
        x = self.n_first(self.twice(x)) + self.n_second(self.twice(x))  # one convolution, two norms
        x = self.n_between(self.between(x).sigmoid())
        x = self.n_again(self.n_again(x))  # no convolution
        x = self.n_other(self.other(x))
        x = self.n_batch(self.batch(x))
        return self.n_late(self.late(x))


def folded(model, images, kept=()):
    watch = Watch(model, kept)
    with torch.no_grad(), watch():
        model(images)
    names = {module: name for name, module in model.named_modules()}
    return watch, [(names[a], names[b]) for a, b in watch.pairs()]


def test_exact_pairs_and_no_others():
    model, images = lived_in(Net()), torch.randn(2, 3, 8, 8)
    expected = model(images)
    watch, pairs = folded(model, images)
    assert pairs == Net.pairs
    assert torch.equal(model(images), expected)  # nothing is changed by watching
    assert watch.fold() == (3, 9)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with Operations() as operations:
        model(images)
    assert sum(n for name, n in operations.counts.items() if 'batch_norm' in name) == 11 - 3  # one norm runs twice


def test_fold_by_hand():
    """w' = w * gamma / sqrt(var + eps), b' = beta + (b - mean) * gamma / sqrt(var + eps)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.5))
    convolution, norm = model
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([2.0, -1.0])[:, None, None, None])
        convolution.bias.copy_(torch.tensor([1.0, 0.0]))
        norm.running_mean.copy_(torch.tensor([3.0, -1.0]))
        norm.running_var.copy_(torch.tensor([3.5, 0.5]))
        norm.weight.copy_(torch.tensor([4.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.25]))
    watch, _ = folded(model.eval().requires_grad_(False), torch.randn(1, 1, 2, 2))
    watch.fold()
    assert convolution.weight.flatten().tolist() == [4.0, -3.0]
    assert convolution.bias.tolist() == [-3.5, 3.25]
    assert not convolution.weight.requires_grad and not convolution.bias.requires_grad


@pytest.mark.parametrize('kind', [1, 2, 3])
def test_dimensions(kind):
    convolution, norm = (getattr(nn, f'{name}{kind}d') for name in ('Conv', 'BatchNorm'))
    model = lived_in(nn.Sequential(convolution(2, 3, 3), norm(3), nn.ReLU(inplace=True)))
    images = torch.randn(2, 2, *[6] * kind)
    expected = model(images)
    watch, pairs = folded(model, images)
    assert watch.fold() == (1, 1)
    torch.testing.assert_close(model(images), expected)


def sequential():
    return lived_in(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), nn.ReLU()))


@pytest.mark.parametrize(
    'tapped, count', [('0.0', 0), ('0', 0), ('1', 1), ('2', 1)], ids=['convolution', 'around it', 'norm', 'behind']
)
def test_what_is_tapped_stays(tapped, count):
    model, images = sequential(), torch.randn(2, 3, 4, 4)
    module, values = model.get_submodule(tapped), []
    watch, pairs = folded(model, images, [module])
    module.register_forward_hook(lambda m, i, o: values.append(o))
    model(images)
    assert len(pairs) == watch.fold()[0] == count
    model(images)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)


def test_modules_with_hooks_or_computed_weights_are_left_alone():
    images = torch.randn(2, 3, 4, 4)
    model = sequential()
    model[0][0].register_forward_hook(lambda m, i, o: o * 2)
    assert folded(model, images)[1] == []
    model = sequential()
    model[1].register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    assert folded(model, images)[1] == []
    model = sequential()
    nn.utils.parametrizations.weight_norm(model[0][0])
    assert folded(model, images)[1] == []
    model = sequential()
    model[1].forward = lambda x: x * 2
    assert folded(model, images)[1] == []


def test_a_shared_convolution_is_folded_when_it_always_meets_one_norm():
    model = sequential()
    twice = nn.Sequential(model, nn.Conv2d(4, 3, 1), model)  # a head that runs on two levels
    images = torch.randn(2, 3, 4, 4)
    expected = twice(images)
    watch, pairs = folded(twice, images)
    assert watch.fold() == (1, 1)
    torch.testing.assert_close(twice(images), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_run_is_not_folded():
    model = sequential()
    model.unused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.forward = lambda x: model[1](model[0](x))
    assert folded(model, torch.randn(2, 3, 4, 4))[1] == [('0.0', '1')]


def test_folding_again_and_by_others_changes_nothing():
    """Ultralytics' validator folds a copy by itself: every norm it finds, by weight and statistics."""
    model, images = sequential(), torch.randn(2, 3, 4, 4)
    watch, _ = folded(model, images)
    watch.fold()
    expected = model(images)
    assert folded(model, images)[1] == []
    other = copy.deepcopy(model)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(other[0][0], other[1])
    torch.testing.assert_close(fused(images).relu(), expected, rtol=1e-5, atol=1e-5)


def test_memory_format_and_dtype_stay():
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    watch, _ = folded(model.double(), torch.randn(2, 3, 4, 4, dtype=torch.double))
    watch.fold()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.double
