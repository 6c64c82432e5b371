"""Make an image look like one of another domain, every object staying where it is.

NumPy arrays ``[H, W, C]``. The functions compute in floating point and neither clip nor round; :func:`translate` does,
and is what turns an 8-bit image into an 8-bit image.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import fft

from kd_dense.errors import ConfigError, closest

METHODS = ('fourier', 'color', 'histogram')


def translate(image: np.ndarray, reference: np.ndarray, method: str = 'fourier', beta: float = 0.01) -> np.ndarray:
    """``image`` in the style of ``reference``.

    Args:
        image: ``[H, W, 3]`` uint8, BGR.
        reference: ``[H', W', 3]`` uint8, BGR, of any size.
        method: ``'fourier'`` (:func:`swap_amplitude`), ``'color'`` (:func:`match_statistics` of the Lab channels), or
            ``'histogram'`` (:func:`match_histograms`).
        beta: of ``'fourier'``.

    Returns:
        ``[H, W, 3]`` uint8.

    Raises:
        ConfigError: an unknown method.
    """
    if method == 'fourier':
        styled = swap_amplitude(image.astype(np.float32), _resized(reference, image).astype(np.float32), beta)
    elif method == 'color':
        lab = match_statistics(_to_lab(image), _to_lab(reference)).astype(np.float32)
        styled = cv2.cvtColor(lab, cv2.COLOR_LAB2BGR) * 255
    elif method == 'histogram':
        styled = match_histograms(image, reference)
    else:
        raise ConfigError(f'style.method: unknown method {method!r}; {closest(str(method), METHODS)}')
    return styled.round().clip(0, 255).astype(np.uint8)


def swap_amplitude(image: np.ndarray, reference: np.ndarray, beta: float = 0.01) -> np.ndarray:
    """Fourier domain adaptation: the lowest frequencies get the amplitude of ``reference`` and keep their phase.

    Channel by channel, those up to ``b = floor(beta min(H, W))`` periods in height and in width. With ``b = 0`` only
    the mean changes. The larger ``beta`` is, the more of the style comes over, and of the content of ``reference`` too.

    Source: Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020, equation 3, with
    ``b`` as in the authors' code. They use 0.01, 0.05 and 0.09.

    Args:
        image, reference: ``[H, W, C]`` float, the same size.
        beta: 0 <= beta <= 0.5.

    Returns:
        ``[H, W, C]`` of the type of ``image``.

    Raises:
        ConfigError: ``beta`` out of its range.
    """
    if not 0 <= beta <= 0.5:
        raise ConfigError(f'style.beta: must lie between 0 and 0.5, not {beta!r}')
    height, width = image.shape[:2]
    b = int(beta * min(height, width))
    # Half of the spectrum is enough: that of a real image is symmetric, and so is the square.
    spectrum, other = (fft.rfft2(x, axes=(0, 1)) for x in (image, reference))
    low = np.ix_(np.arange(-b, b + 1) % height, np.arange(min(b, width // 2) + 1))
    spectrum[low] = np.abs(other[low]) * np.exp(1j * np.angle(spectrum[low]))
    return fft.irfft2(spectrum, s=(height, width), axes=(0, 1)).astype(image.dtype, copy=False)


def match_statistics(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of ``reference``, channel by channel: ``(x - mu) / (sigma + 1e-6) sigma_r + mu_r``.

    Source: Reinhard et al., "Color Transfer between Images", IEEE CG&A 21(5), 2001, who use another colour space with
    decorrelated channels than the CIE Lab of :func:`translate`.

    Args:
        image: ``[H, W, C]``.
        reference: ``[H', W', C]``.

    Returns:
        ``[H, W, C]`` float64.
    """
    image, reference = image.astype(np.float64), reference.astype(np.float64)
    mean, mean_r = (x.mean((0, 1)) for x in (image, reference))
    return (image - mean) / (image.std((0, 1)) + 1e-6) * reference.std((0, 1)) + mean_r


def match_histograms(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The distribution of values of ``reference``, channel by channel: ``CDF_r^-1(CDF(x))``, interpolated linearly.

    The same values as ``skimage.exposure.match_histograms``, before that rounds them down.

    Args:
        image: ``[H, W, C]`` uint8.
        reference: ``[H', W', C]`` uint8.

    Returns:
        ``[H, W, C]`` float64.
    """
    matched = np.empty(image.shape, np.float64)
    for c in range(image.shape[2]):
        counts, counts_r = (np.bincount(x[..., c].ravel(), minlength=256) for x in (image, reference))
        values = np.flatnonzero(counts_r)
        quantiles, quantiles_r = np.cumsum(counts) / counts.sum(), np.cumsum(counts_r[values]) / counts_r.sum()
        matched[..., c] = np.interp(quantiles, quantiles_r, values)[image[..., c]]
    return matched


def _to_lab(image: np.ndarray) -> np.ndarray:
    # in float: OpenCV's 8-bit Lab has less than half of the colours
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_BGR2LAB)


def _resized(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """``reference`` in the size of ``image``; averaging where it shrinks."""
    height, width = image.shape[:2]
    if reference.shape[:2] == (height, width):
        return reference
    shrinks = reference.shape[0] * reference.shape[1] > height * width
    return cv2.resize(reference, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
