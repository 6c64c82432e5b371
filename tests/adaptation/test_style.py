"""Style transfer: amplitudes, statistics and histograms against independent computations in float64."""

import cv2
import numpy as np
import pytest

from kd_dense.adaptation.style import match_histograms, match_statistics, swap_amplitude, translate
from kd_dense.errors import ConfigError

SIZES = [(24, 30), (25, 31), (24, 31), (9, 8)]


def pair(size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (*size, 3)), rng.uniform(50, 200, (*size, 3))


def by_the_book(image, reference, beta):
    """The whole spectrum, zero frequency in the middle, a square of it replaced, as the method is written down."""
    spectrum, other = (np.fft.fft2(x, axes=(0, 1)) for x in (image, reference))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    amplitude, amplitude_r = (np.fft.fftshift(x, axes=(0, 1)) for x in (amplitude, np.abs(other)))
    height, width = image.shape[:2]
    b = int(np.floor(beta * min(height, width)))
    rows = slice(max(height // 2 - b, 0), height // 2 + b + 1)
    columns = slice(max(width // 2 - b, 0), width // 2 + b + 1)
    amplitude[rows, columns] = amplitude_r[rows, columns]
    result = np.fft.ifft2(np.fft.ifftshift(amplitude, axes=(0, 1)) * np.exp(1j * phase), axes=(0, 1))
    assert np.abs(result.imag).max() < 1e-11
    return result.real


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('beta', [0, 0.05, 0.1, 0.3, 0.45])
def test_amplitude_swap_equals_the_full_spectrum(size, beta):
    image, reference = pair(size)
    np.testing.assert_allclose(swap_amplitude(image, reference, beta), by_the_book(image, reference, beta), atol=1e-10)


@pytest.mark.parametrize('size', SIZES)
def test_amplitude_is_swapped_and_phase_kept(size):
    image, reference = pair(size)
    styled = swap_amplitude(image, reference, 0.2)
    b = int(0.2 * min(size))
    new, old, other = (np.fft.fft2(x, axes=(0, 1)) for x in (styled, image, reference))
    rows, columns = (np.minimum(np.arange(n), n - np.arange(n)) <= b for n in size)
    low = rows[:, None] & columns[None]
    assert low.sum() == (2 * b + 1) ** 2
    np.testing.assert_allclose(np.abs(new[low]), np.abs(other[low]), rtol=1e-9)
    np.testing.assert_allclose(new[~low], old[~low], atol=1e-9)
    np.testing.assert_allclose(np.exp(1j * np.angle(new)), np.exp(1j * np.angle(old)), atol=1e-9)


@pytest.mark.parametrize('size', SIZES)
def test_amplitude_of_itself_and_of_the_mean(size):
    image, reference = pair(size)
    for beta in (0, 0.1, 0.5):
        np.testing.assert_allclose(swap_amplitude(image, image, beta), image, atol=1e-11)
    styled = swap_amplitude(image, reference, 0)
    np.testing.assert_allclose(styled.mean((0, 1)), reference.mean((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(styled.std((0, 1)), image.std((0, 1)), rtol=1e-13)


def test_amplitude_of_a_constant_image():
    image, reference = np.full((8, 8, 3), 100.0), np.full((8, 8, 3), 30.0)
    np.testing.assert_allclose(swap_amplitude(image, reference, 0.25), reference, atol=1e-12)


def test_statistics():
    image, reference = pair((20, 30))[0], pair((15, 11), 1)[1]
    styled = match_statistics(image, reference)
    np.testing.assert_allclose(styled.mean((0, 1)), reference.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(styled.std((0, 1)), reference.std((0, 1)), rtol=1e-7)
    np.testing.assert_allclose(match_statistics(image, image), image, atol=1e-5)
    flat = match_statistics(np.full((4, 4, 3), 9.0), reference)
    np.testing.assert_allclose(flat, np.broadcast_to(reference.mean((0, 1)), flat.shape), rtol=1e-12)


def test_colours_get_the_lab_statistics_of_the_reference():
    rng = np.random.default_rng(0)
    image = rng.integers(90, 170, (40, 50, 3), dtype=np.uint8)  # far from black and white: nothing is clipped
    reference = rng.integers(110, 140, (30, 20, 3), dtype=np.uint8)
    styled = translate(image, reference, 'color')
    lab, lab_r = (cv2.cvtColor(x.astype(np.float32) / 255, cv2.COLOR_BGR2LAB) for x in (styled, reference))
    # What is left is the rounding to 8 bits and that OpenCV's way to Lab and back loses half a level.
    np.testing.assert_allclose(lab.mean((0, 1)), lab_r.mean((0, 1)), atol=0.15)
    np.testing.assert_allclose(lab.std((0, 1)), lab_r.std((0, 1)), rtol=0.03)
    before = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_BGR2LAB)
    assert (before.std((0, 1)) > lab_r.std((0, 1)) + 3).all()


def test_histogram_of_a_worked_example():
    image = np.array([0, 0, 1, 2], np.uint8).reshape(2, 2, 1)
    reference = np.array([10, 20, 20, 40], np.uint8).reshape(2, 2, 1)
    # CDF of 0, 1, 2: 1/2, 3/4, 1; of 10, 20, 40: 1/4, 3/4, 1; 1/2 lies half way from 10 to 20
    np.testing.assert_allclose(match_histograms(image, reference).ravel(), [15, 15, 20, 40])


def test_histograms_become_those_of_the_reference():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    reference = rng.normal(120, 20, (50, 70, 3)).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(match_histograms(image, image), image)
    styled = match_histograms(image, reference)
    for q in np.linspace(0.05, 0.95, 19):
        np.testing.assert_allclose(
            np.quantile(styled, q, axis=(0, 1)), np.quantile(reference, q, axis=(0, 1)), atol=1.5
        )
    # an order of brightness is kept
    order = np.argsort(image[..., 0].ravel(), kind='stable')
    assert (np.diff(styled[..., 0].ravel()[order]) >= 0).all()


@pytest.mark.parametrize('method', ['fourier', 'color', 'histogram'])
def test_translation(method):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (33, 40, 3), dtype=np.uint8)
    kept = image.copy()
    bright = np.full((17, 90, 3), 250, np.uint8)
    bright[:, ::2] = 240
    styled = translate(image, bright, method)
    assert styled.shape == image.shape and styled.dtype == np.uint8 and styled.mean() > image.mean() + 50
    np.testing.assert_array_equal(image, kept)
    assert np.abs(translate(image, image, method).astype(int) - image).max() <= 1


def test_wrong_options():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="unknown method 'color_transfer'"):
        translate(image, image, 'color_transfer')
    with pytest.raises(ConfigError, match='style.beta: .*0.6'):
        translate(image, image, beta=0.6)
