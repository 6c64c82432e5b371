"""Fog and night: what they do to an image, that they are reproducible, and the files that are written."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kd_dense.data.weather import KINDS, NIGHT, TINT, add_fog, add_night, write_weather

REPOSITORY = Path(__file__).resolve().parents[2]


def image(size=(40, 48), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_fog_is_grey_takes_contrast_and_is_that_of_imagecorruptions():
    from imagecorruptions import corrupt

    x = np.zeros((64, 64, 3), np.uint8)
    x[:, 32:] = 200, 100, 50
    y = add_fog(x, 3, 5).astype(float)
    fog = y[:, :32]
    assert fog.std(axis=2).max() == 0 and fog.mean() > 40  # no colour of its own, where there was black
    # y = (x + 2.5 p) m / (m + 2.5), m the largest value: differences of two channels shrink by m / (m + 2.5)
    largest = 200 / 255
    np.testing.assert_allclose(np.ptp(y[:, 32:], axis=2), 150 * largest / (largest + 2.5), atol=1)
    np.random.seed(5)
    np.testing.assert_array_equal(y, corrupt(x, severity=3, corruption_name='fog'))
    contrast = [np.ptp(add_fog(x, severity, 5)[:, 32:], axis=2).mean() for severity in (1, 2, 3, 5)]
    assert contrast == sorted(contrast, reverse=True) and contrast[0] > contrast[-1] + 5


def test_fog_leaves_the_random_state_alone():
    np.random.seed(1)
    expected = np.random.random(3)
    np.random.seed(1)
    add_fog(image(), 1, 7)
    np.testing.assert_array_equal(np.random.random(3), expected)


@pytest.mark.parametrize('severity', [1, 3, 5])
def test_night_follows_its_formula(severity):
    gamma, gain, deviation = NIGHT[severity - 1]
    for value in (180, 255):
        x = np.full((100, 120, 3), value, np.uint8)
        y = add_night(x, severity, 2).astype(float)
        expected = 255 * gain * (value / 255) ** gamma * TINT
        assert (expected > 3 * deviation).all()  # so that the noise is not cut off at 0
        np.testing.assert_allclose(y.mean((0, 1)), expected, atol=0.3)
        np.testing.assert_allclose(y.std((0, 1)), deviation, rtol=0.05)
    assert np.abs(np.corrcoef(y.reshape(-1, 3).T) - np.eye(3)).max() < 0.05  # channels have noise of their own


@pytest.mark.parametrize('kind', KINDS)
def test_random_parts_are_those_of_the_seed(kind):
    x = image()
    np.testing.assert_array_equal(KINDS[kind](x, 3, 5), KINDS[kind](x, 3, 5))
    assert (KINDS[kind](x, 3, 5) != KINDS[kind](x, 3, 6)).any()
    assert KINDS[kind](x, 3, 5).dtype == np.uint8


@pytest.mark.parametrize('kind', KINDS)
def test_files(tmp_path, kind):
    for name in ('a.png', 'deep/b.png'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / 'in' / name), image())
    (tmp_path / 'in' / 'notes.txt').write_text('no image')
    assert write_weather(tmp_path / 'in', tmp_path / 'out', kind, progress=False) == 2
    found = [cv2.imread(str(tmp_path / 'out' / name)) for name in ('a.png', 'deep/b.png')]
    assert found[0].shape == image().shape
    assert (found[0] != found[1]).any()  # the same image under another name
    (tmp_path / 'in' / 'a.png').unlink()
    assert write_weather(tmp_path / 'in', tmp_path / 'again', kind, progress=False) == 1
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'again/deep/b.png')), found[1])
    assert sorted(p.name for p in (tmp_path / 'out').rglob('*.*')) == ['a.png', 'b.png']


def test_bad_input(tmp_path, monkeypatch):
    images, out = tmp_path / 'in', tmp_path / 'out'
    images.mkdir()
    with pytest.raises(ValueError, match='there are no images in'):
        write_weather(images, out, 'fog')
    with pytest.raises(ValueError, match="unknown kind 'rain'; known: fog, night"):
        write_weather(images, out, 'rain')
    with pytest.raises(ValueError, match='severity must be one of 1, 2, 3, 4, 5; got 6'):
        write_weather(images, out, 'fog', severity=6)
    with pytest.raises(ValueError, match='would be mixed'):
        write_weather(images, images / 'fog', 'fog')
    cv2.imwrite(str(images / 'small.png'), image((31, 40)))
    with pytest.raises(ValueError, match=r'small\.png: fog needs images of 32 x 32 pixels or more'):
        write_weather(images, out, 'fog', progress=False)
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(ValueError, match=r'small\.png: fog needs the package imagecorruptions; pip install'):
        write_weather(images, out, 'fog', progress=False)
    assert write_weather(images, out, 'night', progress=False) == 1  # which needs neither
    (images / 'bad.png').write_text('no image')
    with pytest.raises(OSError, match='bad.png is no image'):
        write_weather(images, out, 'night', progress=False)


def test_tool(tmp_path, monkeypatch, capsys):
    tool = REPOSITORY / 'tools/dataset_converters/make_weather.py'

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['make_weather.py', *map(str, arguments)])
        runpy.run_path(str(tool), run_name='__main__')

    images, out = tmp_path / 'in', tmp_path / 'out'
    images.mkdir()
    cv2.imwrite(str(images / 'a.png'), image())
    run('--kind', 'night', '--images', images, '--out', out, '--severity', 2)
    assert '1 images in' in capsys.readouterr().out
    one = cv2.imread(str(out / 'a.png'))
    run('--kind', 'night', '--images', images, '--out', tmp_path / 'more', '--severity', 5)
    assert cv2.imread(str(tmp_path / 'more/a.png')).mean() < one.mean() < image().mean()
    with pytest.raises(SystemExit) as exit_:
        run('--kind', 'fog', '--images', tmp_path / 'none', '--out', out)
    assert exit_.value.code == 1 and 'error: there are no images' in capsys.readouterr().err
