"""A frozen teacher: what it is fed, what is loaded, and that nothing reaches it."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from kd_dense.errors import ConfigError
from kd_dense.taps import Taps
from kd_dense.teacher import Normalization, Remap, Teacher, freeze, load_weights, match_classes

IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 'rgb')
CAFFE = Normalization((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), 'bgr')
UNIT = Normalization((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), 'rgb')


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(width, 2, 1)
    )


# -- remap -------------------------------------------------------------------------------------------------------------


def normalized(image: np.ndarray, size: tuple[int, int], canvas: tuple[int, int], norm: Normalization) -> np.ndarray:
    """What a toolbox feeds: an RGB image ``[H, W, 3]`` in the model's order, normalised, padded with 0."""
    image = image if norm.order == 'rgb' else image[..., ::-1]
    out = np.zeros((3, *canvas))
    h, w = size
    out[:, :h, :w] = ((image[:h, :w] - np.array(norm.mean)) / np.array(norm.std)).transpose(2, 0, 1)
    return out


@pytest.mark.parametrize('student', [IMAGENET, CAFFE, UNIT])
@pytest.mark.parametrize('teacher', [IMAGENET, CAFFE, UNIT])
def test_remap_equals_normalising_for_the_teacher(student, teacher):
    rng = np.random.default_rng(0)
    sizes, canvas = [(6, 8), (4, 8), (6, 5)], (6, 8)
    images = [rng.integers(0, 256, (6, 8, 3)).astype(float) for _ in sizes]
    given = np.stack([normalized(i, s, canvas, student) for i, s in zip(images, sizes)])
    wanted = np.stack([normalized(i, s, canvas, teacher) for i, s in zip(images, sizes)])
    remap = Remap(student, teacher)
    result = remap(torch.tensor(given, dtype=torch.float32), torch.tensor(sizes))
    np.testing.assert_allclose(result.numpy(), wanted, atol=2e-4 * abs(wanted).max())
    assert remap.is_identity == (student == teacher)


def test_remap_of_unpadded_batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 8, 3)).astype(float)
    given, wanted = (normalized(image, (6, 8), (6, 8), n)[None] for n in (IMAGENET, CAFFE))
    result = Remap(IMAGENET, CAFFE)(torch.tensor(given, dtype=torch.float32))
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-3)


def test_remap_only_reverses_channels_where_only_the_order_differs():
    remap = Remap(IMAGENET, Normalization(IMAGENET.mean[::-1], IMAGENET.std[::-1], 'bgr'))
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(remap(images), images[:, [2, 1, 0]])
    assert not remap.is_identity and repr(remap) == 'channels reversed'


def test_remap_whole_numbers_and_lists_are_means_too():
    remap = Remap(Normalization([0, 0, 0], [255, 255, 255]), Normalization([0, 0, 0], [1, 1, 1]))
    assert torch.allclose(remap(torch.full((1, 3, 2, 2), 0.5)), torch.tensor(127.5))


def test_remap_grey_images():
    remap = Remap(Normalization((10.0,), (2.0,)), Normalization((4.0,), (3.0,), 'bgr'))
    assert remap(torch.ones(1, 1, 2, 2)).unique().item() == pytest.approx((1 * 2 + 10 - 4) / 3)


def test_remap_resolution():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    half = Remap(None, None, scale=0.5)(image)
    # bilinear at half the size, corners not aligned: the mean of each 2 x 2 block
    assert half.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert Remap(None, None, scale=1.5)(image).shape == (1, 1, 6, 6)
    assert repr(Remap(None, None, scale=0.5)) == 'resized by 0.5'


def test_remap_keeps_the_dtype_and_the_input():
    images = torch.randn(1, 3, 4, 4).half()
    before = images.clone()
    assert Remap(IMAGENET, UNIT)(images, torch.tensor([[2, 2]])).dtype == torch.float16
    assert torch.equal(images, before)


def test_remap_identity():
    assert Remap(None, None).is_identity and Remap(IMAGENET, None).is_identity and Remap(IMAGENET, IMAGENET).is_identity
    images = torch.randn(1, 3, 4, 4)
    assert Remap(IMAGENET, IMAGENET)(images) is images


def test_normalization_errors():
    with pytest.raises(ConfigError, match='sees 1 channels but the student 3'):
        Remap(IMAGENET, Normalization((0.0,), (1.0,)))
    with pytest.raises(ConfigError, match='3 means and 1 standard deviations'):
        Normalization((0.0, 0.0, 0.0), (1.0,))
    with pytest.raises(ConfigError, match="'rgb' or 'bgr', not 'RGB'"):
        Normalization((0.0,), (1.0,), 'RGB')


# -- frozen for good ---------------------------------------------------------------------------------------------------


class Owner(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.student = net()
        self.teacher = teacher

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        self.teacher.follow(fn)
        return self


def test_teacher_is_no_part_of_its_owner():
    model = net()
    owner = Owner(Teacher(model))
    theirs = {id(p) for p in (*model.parameters(), *model.buffers())}
    assert not theirs & {id(t) for t in (*owner.parameters(), *owner.buffers())}
    assert len(owner.state_dict()) == len(net().state_dict())
    assert model not in list(owner.modules())


def test_teacher_evaluates_whoever_calls_train():
    model = net()
    owner = Owner(Teacher(model))
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    owner.train()
    assert not any(m.training for m in model.modules())
    model.train()  # by its own handle
    running = model[1].running_mean.clone()
    images, taps = torch.randn(4, 3, 4, 4), Taps(model, ['4'])
    first = owner.teacher(taps, images, model)['4'][0]
    assert not any(m.training for m in model.modules())
    assert torch.equal(model[1].running_mean, running)
    assert torch.equal(first, owner.teacher(taps, images, model)['4'][0])  # no dropout
    assert not first.requires_grad and not first.is_inference()


def test_teacher_output_can_be_used_in_a_backward():
    model, connector = net(), nn.Conv2d(2, 2, 1)
    values = Teacher(model)(Taps(model, ['4']), torch.randn(2, 3, 4, 4), model)['4'][0]
    (connector(values) * values).sum().backward()  # tensors of inference mode can not be saved for this
    assert connector.weight.grad.abs().sum() > 0


def test_teacher_sees_remapped_images_and_stops():
    model = net()
    seen, deep = [], []
    model[0].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    model[4].register_forward_pre_hook(lambda m, i: deep.append(1))
    teacher, taps = Teacher(model, Remap(IMAGENET, UNIT)), Taps(model, ['1'])
    images = torch.randn(2, 3, 4, 4)
    for _ in range(3):
        values = teacher(taps, images, model, torch.tensor([[4, 4], [2, 4]]))
        expected = (
            images * torch.tensor(IMAGENET.std)[:, None, None] / 255 + torch.tensor(IMAGENET.mean)[:, None, None] / 255
        )
        expected[1, :, 2:] = 0
        torch.testing.assert_close(seen[-1], expected)
        norm = model[1]
        x = nn.functional.conv2d(expected, model[0].weight, model[0].bias)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        # the in-place ReLU behind it has not changed it
        torch.testing.assert_close(values['1'][0], x * norm.weight[:, None, None] + norm.bias[:, None, None])
    assert len(seen) == 3 and len(deep) == 1


def test_teacher_follows_its_owner():
    model = net()
    owner = Owner(Teacher(model))
    owner.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    owner.to(memory_format=torch.channels_last).half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    owner.to('meta')
    assert {p.device.type for p in model.parameters()} == {'meta'}


def test_copies_of_the_owner_have_no_teacher():
    owner = Owner(Teacher(net()))
    big = len(pickle.dumps(owner))
    assert big < 2 * len(pickle.dumps(owner.student))
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert other.teacher is None
    assert isinstance(owner.teacher, Teacher)


def test_freeze_gives_the_model_back():
    model = net()
    assert freeze(model) is model and not model.training


# -- weights -----------------------------------------------------------------------------------------------------------


def test_load_weights_loads_and_reports(caplog):
    source, target = net(), net()
    with caplog.at_level(logging.INFO, 'kd_dense'):
        report = load_weights(target, source.state_dict(), 'a.pth')
    # 3*4+4 + 4+4 + 4*2+2 parameters; three more buffers in the norm
    assert report == 'teacher: 9/9 tensors, 0.0 M of 0.0 M parameters from a.pth'
    assert report in caplog.text
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_load_weights_counts_parameters():
    model = nn.Linear(1000, 1500)
    assert '2/2 tensors, 1.5 M of 1.5 M parameters' in load_weights(model, model.state_dict(), 'a.pth')
    state = {'bias': model.bias.detach()}
    assert '1/2 tensors, 0.0 M of 1.5 M parameters' in load_weights(model, state, 'a.pth', allow=['weight'])


def changed(state, change):
    state = dict(state)
    if change == 'missing':
        del state['4.weight'], state['4.bias']
    elif change == 'unexpected':
        state['5.weight'] = torch.zeros(1)
    elif change == 'reshaped':
        state['4.weight'] = torch.zeros(7, 4, 1, 1)
    return state


@pytest.mark.parametrize(
    'change, message',
    [
        ('missing', r'2 tensors of the model are missing from it \(4.weight, 4.bias\)'),
        ('unexpected', r'1 of its tensors are not in the model \(5.weight\)'),
        ('reshaped', r'1 have another shape \(4.weight: \[7, 4, 1, 1\] in the file, \[2, 4, 1, 1\] in the model\)'),
    ],
)
def test_load_weights_is_strict(change, message):
    model, state = net(), changed(net().state_dict(), change)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message) as error:
        load_weights(model, state, 'a.pth')
    assert str(error.value).startswith('teacher.checkpoint: a.pth does not fit')
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    # another prefix permits nothing here
    with pytest.raises(ConfigError, match=message):
        load_weights(model, state, 'a.pth', allow=['neck.', '3'])
    # permitted: the rest is loaded, and what does not fit stays as it was
    for allow in (['4.', '5.'], ('4.', '5.')):
        load_weights(model, state, 'a.pth', allow=allow)
        assert torch.equal(model[0].weight, state['0.weight'])
        if change != 'unexpected':
            assert torch.equal(model[4].weight, before['4.weight'])


def test_load_weights_takes_a_single_prefix_as_one():
    """Not as its letters, which would permit every name that begins with one of them."""
    state = changed(net().state_dict(), 'missing')
    load_weights(net(), state, 'a.pth', allow='4.')
    with pytest.raises(ConfigError, match='missing'):
        load_weights(net(), state, 'a.pth', allow='x4')


def test_load_weights_of_another_model_or_nothing():
    with pytest.raises(ConfigError, match='have another shape'):
        load_weights(net(4), net(6).state_dict(), 'a.pth')
    with pytest.raises(ConfigError, match=r'8 tensors of the model are missing .*0.weight, 0.bias, 1.weight, \.\.\.'):
        load_weights(net(), {}, 'a.pth')
    with pytest.raises(ConfigError, match='nothing of a.pth was loaded'):
        load_weights(net(), {}, 'a.pth', allow=[''])


def test_load_weights_without_batch_counters():
    """Checkpoints of old torch versions have none; evaluation never reads them."""
    state = {k: v for k, v in net().state_dict().items() if not k.endswith('num_batches_tracked')}
    assert '8/9 tensors' in load_weights(net(), state, 'a.pth')


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'student, teacher, mapping',
    [
        (('a', 'b'), ['a', 'b'], None),
        (None, ('a',), None),
        (('a',), None, None),
        (None, None, {'x': 'y'}),
        (('car', 'person'), ('Car', 'pedestrian'), {'car': 'Car', 'person': 'pedestrian'}),
        (('car', 'person'), ('car', 'pedestrian'), {'person': 'pedestrian'}),
    ],
)
def test_classes_that_match(student, teacher, mapping):
    assert match_classes(student, teacher, mapping) is None


@pytest.mark.parametrize(
    'student, teacher, mapping, message',
    [
        (
            ('a', 'b', 'c'),
            ('a', 'c', 'b'),
            None,
            r"another order \(class 1 is 'c' for the teacher and 'b' for the student\)",
        ),
        (
            ('car', 'bus'),
            ('cars', 'bus'),
            None,
            r"2 against 2; the teacher lacks car \(did you mean 'cars'\?\) and adds cars",
        ),
        (('a',), ('a', 'b', 'c', 'd', 'e'), None, r'5 against 1; the teacher lacks none and adds b, c, d, \.\.\.'),
        (('a', 'b'), ('a',), None, r'1 against 2; the teacher lacks b'),
        (('a', 'b'), (), None, '0 against 2; the teacher lacks a, b and adds none'),
        (('a', 'b'), ('b', 'A'), {'a': 'A'}, 'another order'),
        (('a', 'b'), ('a', 'c'), {'bb': 'c'}, "teacher.classes: the student has no class 'bb'; did you mean 'b'"),
        (('a', 'b'), ('a', 'c'), {'b': 'cc'}, "teacher.classes: the teacher has no class 'cc'; did you mean 'c'"),
    ],
)
def test_classes_that_differ(student, teacher, mapping, message):
    with pytest.raises(ConfigError, match=message) as error:
        match_classes(student, teacher, mapping)
    assert str(error.value).startswith('teacher') and '\n' not in str(error.value)


def test_same_names_with_repetitions_do_not_match():
    with pytest.raises(ConfigError):
        match_classes(('a', 'a', 'b'), ('a', 'b', 'b'))
