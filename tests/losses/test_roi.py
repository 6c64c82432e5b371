"""Losses between two RoI heads, against loops over regions in NumPy and float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from torch.autograd import gradcheck

from kd_dense.losses.roi import (
    bounded_regression,
    decode,
    encode,
    mask_kl,
    matched_objects,
    of_class,
    roi_class_kl,
    roi_giou,
    roi_l1,
)


def normal(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def some_boxes(count, size=50.0):
    corner = torch.rand(count, 2, dtype=torch.float64) * size
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, dtype=torch.float64) * size], 1)


def kl_by_loop(student, teacher, temperature, background_weight, weight_terms):
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        log_q, log_p = log_softmax(s / temperature), log_softmax(t / temperature)
        at_one = softmax(t)[-1]
        region = at_one * background_weight + (1 - at_one)
        for c in range(len(s)):
            weight = (background_weight if c == len(s) - 1 else 1.0) if weight_terms else region
            total += weight * math.exp(log_p[c]) * (log_p[c] - log_q[c])
    return temperature**2 * total / len(student)


def giou_by_loop(student, teacher, weights):
    total = 0.0
    for a, b, w in zip(student.tolist(), teacher.tolist(), weights.tolist(), strict=True):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        total += w * (1 - width * height / union + (hull - union) / hull)
    return total / len(weights)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('background_weight', [1.0, 1.5, 0.0])
@pytest.mark.parametrize('weight_terms', [False, True])
def test_class_kl__by_a_loop(temperature, background_weight, weight_terms):
    student, teacher = 2 * normal(7, 5), 2 * normal(7, 5)
    arguments = temperature, background_weight, weight_terms
    value = roi_class_kl(student, teacher, *arguments).item()
    assert value == pytest.approx(kl_by_loop(student, teacher, *arguments), rel=1e-12)


def test_class_kl__worked_number():
    # one region, one class: teacher (3/4, background 1/4), student (1/2, 1/2); the background counts 1.5 times
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[math.log(3), 0.0]]).double()
    one, other = 0.75 * math.log(1.5), 0.25 * math.log(0.5)
    assert roi_class_kl(student, teacher).item() == pytest.approx(one + other)
    assert roi_class_kl(student, teacher, 1.0, 1.5).item() == pytest.approx((one + other) * 1.125)
    assert roi_class_kl(student, teacher, 1.0, 1.5, True).item() == pytest.approx(one + 1.5 * other)


def test_class_kl__the_minimum_is_at_agreement_with_weighted_regions_only():
    teacher = normal(6, 4)
    for weight_terms in (False, True):
        student = teacher.clone().requires_grad_()
        value = roi_class_kl(student, teacher, 1.0, 1.5, weight_terms)
        value.backward()
        assert value.item() == 0
        assert (student.grad.abs().max() > 1e-3) == weight_terms
    # the gradient of class-weighted cross-entropy with soft labels
    student = normal(6, 4).requires_grad_()
    roi_class_kl(student, teacher, 1.0, 1.5, True).backward()
    own, student = student.grad, student.detach().clone().requires_grad_()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.5]).double()
    (-(weights * teacher.softmax(1) * student.log_softmax(1)).sum() / 6).backward()
    torch.testing.assert_close(own, student.grad)


def test_class_kl__does_not_see_offsets_of_logits_nor_the_order_of_regions():
    student, teacher = normal(6, 4), normal(6, 4)
    value = roi_class_kl(student, teacher, 2.0, 1.5)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(roi_class_kl(student[order] + 7, teacher[order] - 3, 2.0, 1.5), value)


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_l1__by_a_loop():
    student, teacher, weights = normal(7, 4), normal(7, 4), torch.rand(7).double()
    expected = sum(
        w * sum(abs(a - b) for a, b in zip(s, t, strict=True))
        for s, t, w in zip(student.tolist(), teacher.tolist(), weights.tolist(), strict=True)
    )
    assert roi_l1(student, teacher, weights).item() == pytest.approx(expected / 7, rel=1e-12)


def test_giou__by_a_loop_and_at_its_limits():
    student, teacher, weights = some_boxes(9), some_boxes(9), torch.rand(9).double()
    value = roi_giou(student, teacher, weights).item()
    assert value == pytest.approx(giou_by_loop(student, teacher, weights), rel=1e-9)
    assert roi_giou(teacher, teacher, weights).item() == 0
    near, far = torch.tensor([[0.0, 0, 1, 1]]).double(), torch.tensor([[1e6, 1e6, 1e6 + 1, 1e6 + 1]]).double()
    assert roi_giou(near, far, torch.ones(1)).item() == pytest.approx(2, abs=1e-6)
    # neither the place nor the size of an image matters
    moved = roi_giou(student * 3 + 5, teacher * 3 + 5, weights).item()
    assert moved == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize('margin', [0.0, 0.7])
def test_bounded__by_a_loop(margin):
    student, teacher, target = normal(40, 4), normal(40, 4), normal(40, 4)
    positive = torch.arange(40) % 3 > 0
    total = kept = 0
    for s, t, y, is_positive in zip(student.numpy(), teacher.numpy(), target.numpy(), positive.tolist(), strict=True):
        own, bound = ((s - y) ** 2).sum(), ((t - y) ** 2).sum()
        if is_positive and own + margin > bound:
            total, kept = total + own, kept + 1
    assert 5 < kept < positive.sum()
    value = bounded_regression(student, teacher, target, positive, margin).item()
    assert value == pytest.approx(total / 40, rel=1e-12)


def test_bounded__pulls_to_the_truth_until_the_student_is_better():
    target, positive = torch.zeros(1, 4).double(), torch.tensor([True])
    teacher = torch.full((1, 4), 0.5).double()  # 1 away, squared

    def gradient(at, margin=0.0):
        student = torch.full((1, 4), at).double().requires_grad_()
        bounded_regression(student, teacher, target, positive, margin).backward()
        return student.grad[0, 0].item()

    assert gradient(0.6) == pytest.approx(1.2)  # not towards the teacher: towards the truth
    assert gradient(0.4) == 0
    assert gradient(0.4, margin=0.5) == pytest.approx(0.8)  # 0.64 + 0.5 > 1
    assert gradient(0.3, margin=0.5) == 0  # 0.36 + 0.5 < 1


def test_bounded__what_is_not_finite_outside_of_positives_does_no_harm():
    student = normal(3, 4).requires_grad_()
    target = torch.tensor([[0.0] * 4, [float('inf')] * 4, [float('nan')] * 4]).double()
    value = bounded_regression(student, normal(3, 4) * 1e-3, target, torch.tensor([True, False, False]))
    value.backward()
    assert value.item() == pytest.approx(student[0].detach().square().sum().item() / 3)
    assert student.grad.isfinite().all() and (student.grad[1:] == 0).all()


def test_encode_and_decode__are_those_of_the_toolbox_and_inverse():
    from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import bbox2delta, delta2bbox

    rois, boxes = some_boxes(20), some_boxes(20)
    torch.testing.assert_close(encode(rois, boxes), bbox2delta(rois, boxes).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decode(rois, encode(rois, boxes)), boxes)
    deltas = 3 * normal(20, 4)  # some beyond the limit of sizes
    assert (deltas[:, 2:].abs() > math.log(62.5)).any()
    torch.testing.assert_close(decode(rois, deltas), delta2bbox(rois, deltas))


def test_encode__worked_number_and_boxes_without_size():
    roi, box = torch.tensor([[10.0, 20, 30, 60]]).double(), torch.tensor([[15.0, 20, 35, 40]]).double()
    assert encode(roi, box)[0].tolist() == pytest.approx([0.25, -0.25, 0, -math.log(2)])
    empty = torch.tensor([[5.0, 5, 5, 5]]).double()
    assert encode(roi, empty).isfinite().all() and encode(empty, box).isfinite().all()


# -- masks and classes of regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_mask_kl__by_numpy(temperature):
    student, teacher = normal(3, 1, 4, 5), normal(3, 1, 4, 5)
    p, q = (expit(x.numpy() / temperature) for x in (teacher, student))
    expected = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    assert mask_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-10)
    assert mask_kl(teacher, teacher).item() == 0
    huge = 1e4 * torch.ones(1, 1, 2, 2)
    assert mask_kl(huge, -huge).isfinite()


def test_of_class__by_a_loop():
    labels = torch.tensor([2, 0, 1, 2])
    deltas, masks = normal(4, 12), normal(4, 3, 5, 6)
    for r, k in enumerate(labels.tolist()):
        assert torch.equal(of_class(deltas, labels, size=4)[r], deltas[r, 4 * k : 4 * k + 4])
        assert torch.equal(of_class(masks, labels)[r], masks[r, k : k + 1])
    assert torch.equal(of_class(deltas[:, :4], labels, True, 4), deltas[:, :4])
    assert torch.equal(of_class(masks[:, :1], labels, True), masks[:, :1])
    assert of_class(deltas[:0], labels[:0], size=4).shape == (0, 4)
    assert of_class(masks[:0], labels[:0]).shape == (0, 1, 5, 6)


def test_matched_objects__by_a_loop():
    boxes, labels = [some_boxes(3), some_boxes(0), some_boxes(4)], [torch.arange(n) + 1 for n in (3, 0, 4)]
    image = torch.tensor([0, 2, 2, 1, 0, 2]).double()
    rois = torch.cat([image[:, None], some_boxes(6)], 1)
    rois[4, 1:] = boxes[0][1]
    found, classes, iou = matched_objects(rois, boxes, labels)
    for r, (i, *roi) in enumerate(rois.tolist()):
        overlaps = [1 - _iou_distance(roi, box) for box in boxes[int(i)].tolist()]
        if not overlaps:
            assert iou[r] == -1
            continue
        best = int(np.argmax(overlaps))
        assert iou[r].item() == pytest.approx(overlaps[best], abs=1e-12)
        if overlaps[best] > 0:
            assert torch.equal(found[r], boxes[int(i)][best]) and classes[r] == labels[int(i)][best]
    assert iou[4] == 1 and classes[4] == 2


def _iou_distance(a, b):
    width, height = max(0.0, min(a[2], b[2]) - max(a[0], b[0])), max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return 1 - width * height / (areas - width * height)


def test_matched_objects__no_object_at_all_and_no_region():
    rois = torch.cat([torch.zeros(4, 1), some_boxes(4).float()], 1)
    nothing, no_label = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    found, classes, iou = matched_objects(rois, [nothing, nothing], [no_label, no_label])
    assert found.shape == (4, 4) and classes.shape == (4,) and (iou == -1).all()
    assert matched_objects(rois[:0], [nothing], [no_label])[2].shape == (0,)


# -- all of them -------------------------------------------------------------------------------------------------------


def terms(student, deltas, boxes, masks, teacher):
    """Every loss, with the teacher's side and the weights given."""
    logits_t, deltas_t, boxes_t, masks_t, weights, target, positive = teacher
    return {
        'class': roi_class_kl(student, logits_t, 2.0, 1.5),
        'terms': roi_class_kl(student, logits_t, 2.0, 1.5, True),
        'l1': roi_l1(deltas, deltas_t, weights),
        'giou': roi_giou(boxes, boxes_t, weights),
        'bounded': bounded_regression(deltas, deltas_t, target, positive, 0.1),
        'mask': mask_kl(masks, masks_t, 2.0),
    }


def inputs(regions, dtype=torch.float64):
    own = normal(regions, 5), normal(regions, 4), some_boxes(regions), normal(regions, 1, 3, 3)
    their = normal(regions, 5), 0.1 * normal(regions, 4), some_boxes(regions), normal(regions, 1, 3, 3)
    rest = torch.rand(regions), 0.1 * torch.randn(regions, 4), torch.arange(regions) % 2 == 0
    return [x.to(dtype).requires_grad_() for x in own], [*(x.to(dtype).requires_grad_() for x in their), *rest]


@pytest.mark.parametrize('name', ['class', 'terms', 'l1', 'giou', 'bounded', 'mask'])
def test_gradients__are_right_and_go_to_the_student_only(name):
    own, their = inputs(4)
    assert gradcheck(lambda *own: terms(*own, [x.detach() for x in their])[name], own)
    terms(*own, their)[name].backward()
    assert all(x.grad is None for x in their[:4])
    assert sum(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in own) == 1


def test_no_region__is_a_differentiable_zero():
    own, their = inputs(0)
    values = terms(*own, their)
    sum(values.values()).backward()
    assert all(value.item() == 0 for value in values.values())
    assert all(x.grad is not None and x.grad.shape == x.shape for x in own)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision__is_reduced_in_fp32(dtype):
    own, their = inputs(6, dtype)
    exact = terms(*(x.detach().double() for x in own), [*(x.detach().double() for x in their[:4]), *their[4:]])
    for name, value in terms(*own, their).items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-4, abs=1e-6)
