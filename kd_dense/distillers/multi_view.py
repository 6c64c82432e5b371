"""Random views of a batch that leave every object where it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from kd_dense.context import Context, inside
from kd_dense.errors import ConfigError
from kd_dense.teacher import Normalization


class MultiView:
    """With probability ``prob`` per image: jittered colours, then patches that are masked out; else the image itself.

    Only changes that move nothing, because the dense labels and the teacher's tokens stay where they are: the random
    crop and the rotation of the paper are left out. Padding stays as it is.

    Source: the multi-view generator of Liu et al., "Cross-Architecture Knowledge Distillation", equation 7. The paper
    gives neither strengths nor how its transforms are combined; the defaults here are our choice.

    Args:
        normalization: of the images that will be given; ``None``: pixel values 0..255.
        prob: share of the images that are changed.
        brightness, contrast, saturation: factors are drawn from ``1 - x .. 1 + x``; 0 leaves the property alone.
        hue: turned by up to this share of the colour circle, 0..0.5.
        mask_ratio: share of the patches that are set to the mean colour (0 after normalisation).
        patch: side of a patch in pixels.
    """

    def __init__(
        self,
        normalization: Normalization | None = None,
        prob: float = 0.5,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        mask_ratio: float = 0.25,
        patch: int = 32,
    ) -> None:
        shares = dict(prob=prob, brightness=brightness, contrast=contrast, saturation=saturation, mask_ratio=mask_ratio)
        for name, value, most in [*((k, v, 1) for k, v in shares.items()), ('hue', hue, 0.5)]:
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ConfigError(f'{name} must lie in 0..{most}, not {value!r}')
        if not isinstance(patch, int) or patch < 1:
            raise ConfigError(f'patch must be a whole number of pixels, not {patch!r}')
        self.normalization, self.prob, self.mask_ratio, self.patch = normalization, prob, mask_ratio, patch
        reaches = {
            tv.adjust_brightness: (1, brightness),
            tv.adjust_contrast: (1, contrast),
            tv.adjust_saturation: (1, saturation),
            tv.adjust_hue: (0, hue),
        }
        self.jitter = {adjust: (centre, reach) for adjust, (centre, reach) in reaches.items() if reach}

    def __call__(self, images: Tensor, context: Context) -> Tensor:
        """``[B, C, H, W]``, normalised -> the same size; ``images`` stay as they are.

        What is drawn once per image is drawn on the host, so that nothing is ever copied from the device.
        """
        chosen = torch.rand(images.shape[0]).lt(self.prob).tolist()
        viewed = torch.stack([self._one(x) if take else x for x, take in zip(images, chosen, strict=True)])
        if context.image_sizes is None:
            return viewed
        return torch.where(inside(context.image_sizes, context.canvas, images.shape[-2:]), viewed, images)

    def _one(self, image: Tensor) -> Tensor:
        if self.jitter and image.shape[0] == 3:  # colours are what three channels show
            image = self._jittered(image)
        return image * self._kept(image)

    def _jittered(self, image: Tensor) -> Tensor:
        """In pixel values 0..1, red first; back to the type, the order and the normalisation that came in."""
        known = self.normalization or Normalization((0.0,) * 3, (1.0,) * 3, 'rgb')
        mean, std = (image.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (known.mean, known.std))
        pixels = ((image * std + mean) / 255).clamp(0, 1)
        pixels = pixels if known.order == 'rgb' else pixels.flip(0)
        for adjust, (centre, reach) in self.jitter.items():
            (draw,) = torch.rand(1).tolist()
            pixels = adjust(pixels, centre + reach * (2 * draw - 1))
        pixels = pixels if known.order == 'rgb' else pixels.flip(0)
        return ((pixels * 255 - mean) / std).to(image.dtype)

    def _kept(self, image: Tensor) -> Tensor:
        """``[1, H, W]``: 0 in the patches that are masked out, else 1; drawn on the device."""
        height, width = image.shape[-2:]
        grid = math.ceil(height / self.patch), math.ceil(width / self.patch)
        kept = (torch.rand(1, 1, *grid, device=image.device) >= self.mask_ratio).to(image.dtype)
        return F.interpolate(kept, scale_factor=self.patch, mode='nearest')[0, :, :height, :width]
