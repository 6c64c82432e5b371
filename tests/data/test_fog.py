"""Fog: the formula, that it is reproducible, and the files that are written."""

import math
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kd_dense.data.fog import LIGHT, add_fog, write_foggy

REPOSITORY = Path(__file__).resolve().parents[2]


def image(size=(30, 40), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_no_fog_and_all_fog():
    x = image()
    np.testing.assert_array_equal(add_fog(x, 0), x)
    assert np.abs(add_fog(x, 1e4) - LIGHT).max() <= 0.5


@pytest.mark.parametrize('density', [0.5, 1.5])
def test_black_and_white_obey_the_law(density):
    """``y = x t + A (1 - t)``: from black and white follow ``t`` and ``A``, and ``t`` is between its bounds."""
    black, white = (add_fog(np.full((50, 60, 3), v, np.uint8), density, 3).astype(float) for v in (0, 255))
    left = (white - black) / 255
    np.testing.assert_allclose(black, LIGHT * (1 - left), atol=1.5)
    assert math.exp(-1.3 * density) - 0.01 <= left.min() and left.max() <= math.exp(-0.1 * density) + 0.01
    assert left[-1].mean() > left[0].mean() + 0.1  # clearer at the bottom
    assert left[25].std() > 0.01  # in patches


def test_fog_is_that_of_its_seed():
    x = image()
    np.testing.assert_array_equal(add_fog(x, 1, 5), add_fog(x, 1, 5))
    assert (add_fog(x, 1, 5) != add_fog(x, 1, 6)).any()


def test_files(tmp_path):
    for name in ('a.png', 'deep/b.png'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / 'in' / name), image())
    (tmp_path / 'in' / 'notes.txt').write_text('no image')
    assert write_foggy(tmp_path / 'in', tmp_path / 'out', progress=False) == 2
    found = [cv2.imread(str(tmp_path / 'out' / name)) for name in ('a.png', 'deep/b.png')]
    assert (found[0] != found[1]).any()  # the same image under another name
    (tmp_path / 'in' / 'a.png').unlink()
    assert write_foggy(tmp_path / 'in', tmp_path / 'again', progress=False) == 1
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'again/deep/b.png')), found[1])
    assert sorted(p.name for p in (tmp_path / 'out').rglob('*.*')) == ['a.png', 'b.png']


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='there are no images in'):
        write_foggy(tmp_path, tmp_path.parent / 'out')
    with pytest.raises(ValueError, match='density'):
        write_foggy(tmp_path, tmp_path.parent / 'out', density=-1)
    with pytest.raises(ValueError, match='would be mixed'):
        write_foggy(tmp_path, tmp_path / 'out')
    (tmp_path / 'bad.png').write_text('no image')
    with pytest.raises(OSError, match='bad.png is no image'):
        write_foggy(tmp_path, tmp_path.parent / 'out', progress=False)


def test_tool(tmp_path, monkeypatch, capsys):
    cv2.imwrite(str(tmp_path / 'a.png'), image())
    tool = REPOSITORY / 'tools/dataset_converters/make_fog.py'
    out = tmp_path.parent / f'{tmp_path.name}_out'
    monkeypatch.setattr(sys, 'argv', ['make_fog.py', '--images', str(tmp_path), '--out', str(out), '--density', '2'])
    runpy.run_path(str(tool), run_name='__main__')
    assert '1 images in fog' in capsys.readouterr().out and (out / 'a.png').is_file()
    monkeypatch.setattr(sys, 'argv', ['make_fog.py', '--images', str(tmp_path / 'none'), '--out', str(out)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(tool), run_name='__main__')
    assert exit_.value.code == 1 and 'error: there are no images' in capsys.readouterr().err
