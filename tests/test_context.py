"""Masks of the cells that count, against loops over pixels."""

import math

import numpy as np
import pytest
import torch

from kd_dense.context import Context, inside
from tests.helpers.waits import Waits


def inside_loops(sizes, canvas, size):
    mask = np.zeros((len(sizes), 1, *size), bool)
    for b, (height, width) in enumerate(sizes):
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = (i + 0.5) * canvas[0] / size[0], (j + 0.5) * canvas[1] / size[1]
                mask[b, 0, i, j] = y < height and x < width
    return mask


def labels_loops(labels, size, ignore):
    b, height, width = labels.shape
    mask = np.zeros((b, 1, *size), bool)
    for n in range(b):
        for i in range(size[0]):
            for j in range(size[1]):
                y, x = math.floor((i + 0.5) * height / size[0]), math.floor((j + 0.5) * width / size[1])
                mask[n, 0, i, j] = labels[n, y, x] != ignore
    return mask


@pytest.mark.parametrize('size', [(64, 96), (16, 24), (8, 12), (2, 3), (1, 1), (7, 11), (128, 100)])
def test_inside_equals_loops(size):
    sizes = [(64, 96), (33, 96), (64, 1), (50, 70), (1, 1), (31, 47)]
    result = inside(torch.tensor(sizes), (64, 96), size)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), inside_loops(sizes, (64, 96), size))


def test_inside_worked():
    # stride 4 on 8 x 8: centres at 2 and 6; an image of 6 x 7 has no centre at y = 6, one of 7 x 6 none at x = 6
    result = inside(torch.tensor([[6, 7], [7, 6], [8, 8], [2, 2]]), (8, 8), (2, 2))
    assert result[:, 0].int().tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]


def test_nothing_to_leave_out():
    assert Context(canvas=(8, 8)).mask((2, 2)) is None


def test_mask_worked_example():
    """Padding and ignored pixels together, at stride 2 of a 4 x 4 canvas."""
    labels = torch.tensor([[[0, 1, 1, 1], [1, 255, 1, 255], [0, 0, 0, 0], [255, 0, 0, 0]]])
    context = Context(canvas=(4, 4), image_sizes=torch.tensor([[4, 3]]), label_map=labels)
    # The centre of a cell lies on the corner of four pixels and takes the one to its lower right: (1, 1) and (1, 3) are
    # ignored, (3, 1) and (3, 3) are not; the second column has its centre at x = 3, outside an image of width 3.
    assert context.mask((2, 2)).int().tolist() == [[[[0, 0], [1, 0]]]]
    full = context.mask((4, 4))[0, 0]
    expected = (labels[0] != 255) & torch.tensor([True, True, True, False])
    assert torch.equal(full, expected)


@pytest.mark.parametrize('size', [(32, 48), (8, 12), (4, 6), (5, 7), (32, 12), (64, 96)])
def test_mask_equals_loops(size):
    labels = torch.randint(0, 4, (3, 32, 48))
    labels[torch.rand(3, 32, 48) < 0.3] = 250
    sizes = [(32, 48), (20, 48), (9, 31)]
    context = Context(canvas=(32, 48), image_sizes=torch.tensor(sizes), label_map=labels, ignore_index=250)
    expected = labels_loops(labels.numpy(), size, 250) & inside_loops(sizes, (32, 48), size)
    np.testing.assert_array_equal(context.mask(size).numpy(), expected)
    only_labels = Context(canvas=(32, 48), label_map=labels, ignore_index=250)
    np.testing.assert_array_equal(only_labels.mask(size).numpy(), labels_loops(labels.numpy(), size, 250))


def test_mask_is_computed_once_for_each_size():
    context = Context(canvas=(8, 8), image_sizes=torch.tensor([[6, 8]]))
    assert context.mask((4, 4)) is context.mask(torch.Size([4, 4]))
    assert context.mask((2, 2)).shape == (1, 1, 2, 2)


def test_masks_are_not_shared_between_batches():
    first, second = (Context(canvas=(8, 8), image_sizes=torch.tensor([[n, 8]])) for n in (2, 8))
    assert not torch.equal(first.mask((4, 4)), second.mask((4, 4)))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_label_types(dtype):
    labels = torch.tensor([[[0, 255], [3, 1]]], dtype=dtype)
    assert Context(canvas=(2, 2), label_map=labels).mask((2, 2)).flatten().tolist() == [True, False, True, True]
    assert Context(canvas=(2, 2), label_map=labels).mask((4, 4)).sum() == 12


def test_masks_do_not_wait_for_the_device():
    context = Context(
        canvas=(8, 8), image_sizes=torch.tensor([[6, 8]]), label_map=torch.zeros(1, 8, 8, dtype=torch.long)
    )
    with Waits() as waits:
        context.mask((4, 4))
        context.mask((8, 8))
    assert waits.seen == []
