import numpy as np
import pytest

from kd_dense.data.scene_drawing import Scene
from kd_dense.data.scene_labels import box_of, label_scene, outline_of, yolo_row


def fill_even_odd(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixel centres from which a ray to the right crosses the polygon's edges an odd number of times."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    inside = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0)):
        if y0 != y1:
            crosses = ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
            inside ^= crosses
    return inside


def mask_from(*rows: str) -> np.ndarray:
    return np.array([[c == '#' for c in row] for row in rows])


@pytest.mark.parametrize(
    'mask',
    [
        mask_from('....', '.#..', '....'),
        mask_from('####', '#..#', '#..#', '####'),
        mask_from('##...##', '##...##', '.......', '...#...'),
        mask_from('#....', '.#...', '..##.', '.#..#'),
        mask_from('#######', '#.#...#', '#####.#', '#...#.#', '#.#.###', '#####..'),
    ],
    ids=['pixel', 'hole', 'parts', 'diagonal', 'many'],
)
def test_outline_covers_exactly_the_mask(mask):
    assert np.array_equal(fill_even_odd(outline_of(mask), mask.shape), mask)


def test_outline_of_random_masks():
    rng = np.random.default_rng(0)
    for density in (0.2, 0.5, 0.8):
        mask = rng.random((15, 20)) < density
        assert np.array_equal(fill_even_odd(outline_of(mask), mask.shape), mask)


def test_outline_of_a_rectangle_is_its_four_corners():
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    assert {tuple(p) for p in outline_of(mask).tolist()} == {(2, 1), (7, 1), (7, 4), (2, 4)}
    assert len(outline_of(mask)) == 4
    assert box_of(mask) == (2, 1, 5, 3)


def test_yolo_row_divides_by_width_and_height():
    assert yolo_row(3, np.array([[2, 1], [8, 4], [0, 2]]), (4, 8)) == '3 0.25 0.25 1 1 0 0.5'


def test_label_scene_void_border_and_dropped_objects():
    """Two overlapping squares, one far square, and a scrap of four pixels."""
    owner = np.zeros((20, 30), np.int16)
    owner[2:10, 2:10] = 1
    owner[6:14, 6:14] = 2
    owner[2:8, 20:26] = 3
    owner[15:17, 20:22] = 4
    scene = Scene(np.zeros((20, 30, 3), np.uint8), owner, class_ids=[5, 2, 1, 6], drawn_pixels=[64, 64, 36, 4])
    label_map, objects = label_scene(scene)

    assert [o.class_id for o in objects] == [5, 2, 1]
    assert [int(o.mask.sum()) for o in objects] == [48, 64, 36]
    expected = np.zeros((20, 30), np.uint8)
    expected[2:10, 2:10] = 5
    expected[5, 6:10] = expected[6:10, 5] = 255  # the part of the rear square that touches the front one
    expected[6:14, 6:14] = 2
    expected[2:8, 20:26] = 1
    expected[15:17, 20:22] = 255
    assert np.array_equal(label_map, expected)


def test_mostly_hidden_object_is_void():
    owner = np.zeros((20, 20), np.int16)
    owner[5:10, 5:10] = 1
    kwargs = {'image': np.zeros((20, 20, 3), np.uint8), 'owner': owner, 'class_ids': [1]}
    assert len(label_scene(Scene(**kwargs, drawn_pixels=[125]))[1]) == 1
    label_map, objects = label_scene(Scene(**kwargs, drawn_pixels=[126]))
    assert objects == []
    assert set(np.unique(label_map)) == {0, 255}
