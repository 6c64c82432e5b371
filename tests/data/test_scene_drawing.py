import cv2
import numpy as np
import pytest

from kd_dense.data.scene_drawing import CLASSES, draw_scene
from kd_dense.data.scene_labels import label_scene


def test_same_arguments_same_scene_and_different_ones_differ():
    base = draw_scene((64, 64), 3, 'train', 5)
    again = draw_scene((64, 64), 3, 'train', 5)
    assert np.array_equal(base.image, again.image)
    assert np.array_equal(base.owner, again.owner)
    assert base.class_ids == again.class_ids
    for other in ((4, 'train', 5), (3, 'val', 5), (3, 'train', 6)):
        assert not np.array_equal(base.image, draw_scene((64, 64), *other).image)


def test_difficulty_adds_small_objects_and_noise():
    def small_share_and_noise(difficulty):
        scenes = [draw_scene((96, 96), 0, 'val', index, difficulty) for index in range(20)]
        drawn = np.concatenate([s.drawn_pixels for s in scenes])
        noise = [np.abs(cv2.Laplacian(s.image, cv2.CV_32F)[s.owner == 0]).mean() for s in scenes]
        return np.mean(drawn < 150), np.median(noise)

    (small_easy, noise_easy), (small_hard, noise_hard) = small_share_and_noise(0.0), small_share_and_noise(1.0)
    assert small_hard > 1.5 * small_easy
    assert noise_hard > 1.5 * noise_easy


@pytest.mark.parametrize('size', [(64, 64), (48, 96), (96, 40)])
def test_shapes_types_and_owners(size):
    for index in range(4):
        scene = draw_scene(size, 0, 'val', index)
        assert scene.image.shape == (*size, 3)
        assert scene.image.dtype == np.uint8
        assert scene.owner.shape == size
        assert 0 <= scene.owner.min() <= scene.owner.max() <= len(scene.class_ids) == len(scene.drawn_pixels)
        shown = np.bincount(scene.owner.ravel(), minlength=len(scene.class_ids) + 1)[1:]
        assert (shown <= scene.drawn_pixels).all()


def test_scenes_have_occlusion_small_objects_and_every_class():
    scenes = [draw_scene((128, 128), 0, 'train', index) for index in range(20)]
    shown = np.concatenate([np.bincount(s.owner.ravel(), minlength=len(s.class_ids) + 1)[1:] for s in scenes])
    drawn = np.concatenate([s.drawn_pixels for s in scenes])
    assert 0.1 < np.mean(shown < drawn) < 0.7
    assert np.mean(drawn < 256) > 0.4
    assert np.mean(drawn > 1024) > 0.03
    assert {c for s in scenes for c in s.class_ids} == set(range(1, len(CLASSES)))


def nearest_mean_accuracy(features: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy on the second half of the nearest class mean of the first half, in standardised features."""
    features = (features - features.mean(0)) / features.std(0)
    half = len(targets) // 2
    means = np.stack([features[:half][targets[:half] == c].mean(0) for c in range(1, len(CLASSES))])
    nearest = ((features[half:, None] - means) ** 2).sum(-1).argmin(1) + 1
    return float((nearest == targets[half:]).mean())


def test_classes_differ_in_shape_not_in_colour():
    """Colour mean and spread of an object say little more than chance (1/6) on its class; four shape features do."""
    colours, shapes, targets = [], [], []
    for index in range(80):
        scene = draw_scene((96, 96), 1, 'train', index)
        for item in label_scene(scene)[1]:
            pixels = scene.image[item.mask]
            mask = np.pad(item.mask.astype(np.uint8), 1)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            contour = max(contours, key=len)
            width, height = np.add(cv2.minAreaRect(contour)[1], 1)
            hull = cv2.contourArea(cv2.convexHull(contour)) + 1
            filled = cv2.contourArea(contour) + 1
            shapes.append(
                (item.mask.sum() / filled, filled / hull, filled / (width * height), abs(np.log(width / height)))
            )
            colours.append((*pixels.mean(0), *pixels.std(0)))
            targets.append(item.class_id)
    targets = np.array(targets)
    assert nearest_mean_accuracy(np.array(colours), targets) < 0.3
    assert nearest_mean_accuracy(np.array(shapes), targets) > 0.5
