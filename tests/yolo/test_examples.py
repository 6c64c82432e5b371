"""Drawn predictions for comparison figures."""

import numpy as np

import kd_dense.yolo


def test_every_image_is_drawn_for_every_checkpoint(write_config, teacher_file):
    rows = kd_dense.yolo.examples(write_config(), {'student': teacher_file('yolov8'), 'teacher': None}, count=3)
    assert len(rows) == 3
    for row in rows:
        assert list(row) == ['input', 'truth', 'student', 'teacher']
        assert {(image.shape, image.dtype) for image in row.values()} == {((64, 64, 3), np.dtype('uint8'))}
    assert (rows[0]['truth'] != rows[0]['input']).any()  # boxes are drawn
