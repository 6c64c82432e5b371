"""Labels of a scene and of masks in general: label map, visible objects, outlines, YOLO rows."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from kd_dense.data.scene_drawing import Scene

VOID = 255
MIN_VISIBLE_PIXELS = 12
MIN_VISIBLE_SHARE = 0.2


@dataclass
class VisibleObject:
    """The visible part of one object.

    Attributes:
        class_id: 1..6.
        mask: (H, W) bool.
    """

    class_id: int
    mask: np.ndarray


def label_scene(scene: Scene) -> tuple[np.ndarray, list[VisibleObject]]:
    """Label map and object list of a scene.

    Objects that show fewer than 12 pixels or less than a fifth of what would be visible without occlusion are not
    listed, and their pixels are void. Where one object lies in front of another, the pixels of the rear one that
    touch it are void too, so that a one-pixel border separates them.

    Returns:
        label_map: (H, W) uint8, 0 background, 1..6 classes, 255 void.
        objects: visible objects, back to front. Their masks include the void border.
    """
    owner = scene.owner
    counts = np.bincount(owner.ravel(), minlength=len(scene.class_ids) + 1)
    lookup = np.zeros(len(scene.class_ids) + 1, np.uint8)
    objects = []
    for number, (class_id, drawn) in enumerate(zip(scene.class_ids, scene.drawn_pixels, strict=True), start=1):
        if counts[number] < max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * drawn):
            lookup[number] = VOID
        else:
            lookup[number] = class_id
            objects.append(VisibleObject(class_id, owner == number))
    label_map = lookup[owner]
    in_front = cv2.dilate(owner, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    label_map[(owner > 0) & (in_front > owner)] = VOID
    return label_map, objects


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box (x, y, width, height) of a non-empty mask (H, W), in pixels; pixel ``i`` spans ``i .. i + 1``."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def outline_of(mask: np.ndarray) -> np.ndarray:
    """One closed polygon around all parts and holes of a mask, along the pixel edges.

    Formats such as YOLO's have room for one polygon per object. Separate parts and holes are therefore joined to it
    by bridges that are walked in both directions: under the even-odd rule they enclose nothing and the polygon covers
    exactly the pixels of the mask.

    Args:
        mask: (H, W), non-empty.

    Returns:
        (P, 2) int array of (x, y) corners; pixel ``i`` spans ``i .. i + 1``.
    """
    # On the doubled mask, contour points 2i and 2i + 1 are the near and the far side of pixel i: halving and rounding
    # up turns a contour through pixel centres into the pixels' edges, for outer contours and for holes.
    x, y, width, height = box_of(mask)
    crop = np.asarray(mask[y : y + height, x : x + width], np.uint8)
    doubled = cv2.copyMakeBorder(np.repeat(np.repeat(crop, 2, 0), 2, 1), 2, 2, 2, 2, cv2.BORDER_CONSTANT)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parts = [_corners((c.reshape(-1, 2) + 1) // 2 + (x - 1, y - 1)) for c in contours]
    parts.sort(key=len, reverse=True)

    path = parts.pop(0)
    while parts:
        distances = [((path[:, None] - part[None]) ** 2).sum(-1) for part in parts]
        nearest = int(np.argmin([d.min() for d in distances]))
        part, distance = parts.pop(nearest), distances[nearest]
        i, j = np.unravel_index(int(distance.argmin()), distance.shape)
        path = np.concatenate([path[: i + 1], part[j:], part[: j + 1], path[i:]])
    return path


def _corners(polygon: np.ndarray) -> np.ndarray:
    """Drop repeated points, then points on a straight line between their neighbours."""
    polygon = polygon[(polygon != np.roll(polygon, 1, 0)).any(1)]
    before, after = polygon - np.roll(polygon, 1, 0), np.roll(polygon, -1, 0) - polygon
    return polygon[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def yolo_row(class_index: int, polygon: np.ndarray, size: tuple[int, int]) -> str:
    """One line of a YOLO label file: class index and the polygon (P, 2), divided by the image width and height.

    The detection task derives its boxes from the polygons, so one label folder serves detection and segmentation.
    """
    normalised = np.clip(polygon / np.array([size[1], size[0]], np.float64), 0.0, 1.0)
    return ' '.join([str(class_index), *(f'{value:.6g}' for value in normalised.ravel())])
