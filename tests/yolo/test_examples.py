"""Drawn predictions for comparison figures."""

import numpy as np

import kd_dense.yolo


def test_every_image_is_drawn_for_every_checkpoint(write_config, teacher_file):
    rows = kd_dense.yolo.examples(write_config(), {'student': teacher_file('yolov8'), 'teacher': None}, count=3)
    assert len(rows) == 3
    inputs = [row['input'] for row in rows]
    for row in rows:
        assert list(row) == ['input', 'truth', 'student', 'teacher']
        assert {image.dtype for image in row.values()} == {np.dtype('uint8')}
        assert row.pop('input').shape == (64, 64, 3)
        assert {image.shape for image in row.values()} == {(512, 512, 3)}  # eight times as large
    plain = rows[0]['truth'][::8, ::8]
    assert (plain != inputs[0]).any()  # boxes are drawn
    assert (plain == inputs[0]).all(2).mean() > 0.3  # on the image itself


def test_masks_are_drawn_too(write_config, teacher_file, mask_data):
    config = write_config(data=str(mask_data), teacher={'checkpoint': teacher_file('yolo11', '-seg')})
    (row,) = kd_dense.yolo.examples(config, {'teacher': None}, count=1)
    assert row['teacher'].shape == (512, 512, 3)
