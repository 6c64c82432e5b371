"""The regions of localisation distillation, against a loop over boxes and anchors in plain Python."""

import math
import statistics

import pytest
import torch

from kd_dense.geometry.localization_regions import localization_regions, overlaps
from tests.helpers.dispatch import Operations

STRIDES = (4, 8, 16)


def pyramid(height=32, width=48, scales=(4.0,), ratios=(1.0,), offset=0.0):
    """Anchors of three levels, ``[h*w, A, 4]`` each, in float64."""
    levels = []
    for stride in STRIDES:
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        cells = []
        for row in range(rows):
            for column in range(columns):
                x, y = (column + offset) * stride, (row + offset) * stride
                anchors = []
                for scale in scales:
                    for ratio in ratios:
                        w, h = scale * stride / math.sqrt(ratio) / 2, scale * stride * math.sqrt(ratio) / 2
                        anchors.append([x - w, y - h, x + w, y + h])
                cells.append(anchors)
        levels.append(torch.tensor(cells, dtype=torch.float64))
    return levels


def random_boxes(count, height=32, width=48):
    corner = torch.rand(count, 2, dtype=torch.float64) * torch.tensor([width * 0.7, height * 0.7], dtype=torch.float64)
    return torch.cat([corner, corner + 3 + torch.rand(count, 2, dtype=torch.float64) * 20], 1)


def iou_and_diou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    iou = w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)
    between = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    return iou, iou - between / diagonal


def by_loops(levels, boxes, valid=None, nearest=9, share=0.25):
    """Every anchor's place in the regions, in the order of the result."""
    flat = [anchor for level in levels for cell in level.tolist() for anchor in cell]
    usable, owners = [], []
    for i, level in enumerate(levels):
        for cell in range(len(level)):
            ok = True if valid is None else bool(valid[sum(map(len, levels[:i])) + cell])
            owners += [(i, cell)] * level.shape[1]
            usable += [ok] * level.shape[1]
    main, valuable = [False] * len(flat), [0.0] * len(flat)
    for box in boxes.tolist():
        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates = set()
        for i in range(len(levels)):
            cells = {}
            for (level, cell), anchor, ok in zip(owners, flat, usable, strict=True):
                if level == i and ok:
                    cells[cell] = ((anchor[0] + anchor[2]) / 2 - cx) ** 2 + ((anchor[1] + anchor[3]) / 2 - cy) ** 2
            chosen = sorted(cells, key=cells.get)[:nearest]
            candidates |= {n for n, owner in enumerate(owners) if owner[0] == i and owner[1] in chosen}
        ious = [iou_and_diou(flat[n], box)[0] for n in sorted(candidates)]
        threshold = statistics.mean(ious) + (statistics.stdev(ious) if len(ious) > 1 else 0.0)
        for n, anchor in enumerate(flat):
            iou, diou = iou_and_diou(anchor, box)
            x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            main[n] = main[n] or (n in candidates and iou >= threshold and inside)
            if usable[n] and share * threshold <= diou < threshold:
                valuable[n] = max(valuable[n], iou)
    return torch.tensor(main), torch.tensor(valuable, dtype=torch.float64)


CASES = {
    'one anchor': dict(),
    'centres of cells': dict(offset=0.5),
    'six anchors': dict(scales=(3.0, 4.5), ratios=(0.5, 1.0, 2.0)),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('nearest, share', [(9, 0.25), (3, 0.0), (1, 0.6)])
def test_regions_are_those_of_the_loops(case, nearest, share):
    levels, boxes = pyramid(**CASES[case]), random_boxes(7)
    main, valuable = localization_regions(levels, boxes, nearest=nearest, share=share)
    expected_main, expected_valuable = by_loops(levels, boxes, nearest=nearest, share=share)
    assert torch.equal(main, expected_main)
    torch.testing.assert_close(valuable, expected_valuable)
    assert main.any() and not main.all()
    assert (valuable > 0).any() and not (valuable > 0).all()
    assert len(main) == sum(level.shape[0] * level.shape[1] for level in levels)


@pytest.mark.parametrize('case', CASES)
def test_padding_is_in_no_region_and_no_candidate(case):
    levels, boxes = pyramid(**CASES[case]), random_boxes(5, 20, 24)
    # true size 20 x 24 of 32 x 48
    valid = torch.cat([
        torch.tensor([(r + 0.5) * s < 20 and (c + 0.5) * s < 24 for r in range(32 // s) for c in range(48 // s)])
        for s in STRIDES
    ])  # fmt: skip
    main, valuable = localization_regions(levels, boxes, valid)
    expected_main, expected_valuable = by_loops(levels, boxes, valid)
    assert torch.equal(main, expected_main)
    torch.testing.assert_close(valuable, expected_valuable)
    per_anchor = valid.repeat_interleave(levels[0].shape[1])
    assert not main[~per_anchor].any() and not valuable[~per_anchor].any()
    unmasked = localization_regions(levels, boxes)
    assert (unmasked[1][~per_anchor] > 0).any()  # the mask did something


def test_main_region_is_what_mmdets_atss_assigns():
    from mmdet.models.task_modules.assigners import ATSSAssigner
    from mmengine.structures import InstanceData

    levels, boxes = pyramid(64, 64), random_boxes(6, 64, 64)
    priors = torch.cat([level[:, 0] for level in levels])
    # named with its scope: other tests leave that of MMSegmentation as the default
    result = ATSSAssigner(topk=9, iou_calculator=dict(type='mmdet.BboxOverlaps2D')).assign(
        InstanceData(priors=priors), [len(level) for level in levels],
        InstanceData(bboxes=boxes, labels=torch.zeros(6, dtype=torch.long)),
    )  # fmt: skip
    main, _ = localization_regions(levels, boxes)
    assert torch.equal(main, result.gt_inds > 0)
    assert main.sum() > 6


def test_valuable_region_surrounds_a_box():
    """A box like an anchor: the anchor itself is main, those around it valuable, and those far away neither."""
    levels = pyramid(64, 64)
    index = 16 * 8 + 8  # cell (8, 8) of the finest level, 16 cells wide
    box = levels[0][index]
    main, valuable = localization_regions(levels, box)
    # IoU 1 with itself and 0.6 with its four neighbours, a quarter of its side away
    assert main.nonzero().flatten().tolist() == [index - 16, index - 1, index, index + 1, index + 16]
    assert valuable[index] == 0  # too good
    # IoU 1/3, centres 8 of a diagonal of sqrt(24^2 + 16^2) apart
    assert valuable[index + 2].item() == pytest.approx(1 / 3)
    assert valuable[0] == 0


def test_boxes_of_other_order_or_twice_change_nothing():
    levels, boxes = pyramid(), random_boxes(6)
    expected = localization_regions(levels, boxes)
    for other in (boxes.flip(0), torch.cat([boxes, boxes])):
        for a, b in zip(localization_regions(levels, other), expected, strict=True):
            assert torch.equal(a, b)


def test_no_box_has_no_region():
    main, valuable = localization_regions(pyramid(), torch.zeros(0, 4))
    assert not main.any() and not valuable.any()
    assert main.dtype == torch.bool and valuable.dtype == torch.float64


def test_a_box_without_area_or_outside_the_canvas_is_harmless():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [-90.0, -90.0, -80.0, -80.0], [900.0, 900.0, 990.0, 990.0]])
    main, valuable = localization_regions(pyramid(), boxes.double())
    assert valuable.isfinite().all() and not main.any()


def test_overlaps_are_those_of_a_pair_at_a_time():
    a, b = random_boxes(6), random_boxes(9)
    iou, diou = overlaps(a, b)
    for i in range(6):
        for j in range(9):
            expected = iou_and_diou(a[i].tolist(), b[j].tolist())
            assert (iou[i, j].item(), diou[i, j].item()) == pytest.approx(expected)


def test_number_of_operations_does_not_depend_on_the_boxes_and_none_waits():
    levels, valid = pyramid(), torch.ones(sum(map(len, pyramid())), dtype=torch.bool)
    totals = []
    for count in (1, 30):
        boxes = random_boxes(count)
        with Operations() as operations:
            localization_regions(levels, boxes, valid)
        assert operations.seen == [] and operations.uploads == []
        totals.append(operations.total)
    assert totals[0] == totals[1]
