"""Distillation with dynamic prior knowledge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.connectors import match_size
from kd_dense.connectors.dpk import PriorReconstruction
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe, paired_shapes
from kd_dense.errors import ConfigError
from kd_dense.losses import mse
from kd_dense.losses.cka import LEAST, cka, hsic_terms
from kd_dense.losses.reduction import at_least_fp32, zero_outside
from kd_dense.random_state import step_seed
from kd_dense.registry import DISTILLERS

REGIONS = ('all', 'student_only')
EXAMPLES = ('cells', 'images')


@DISTILLERS.register_module()
class DPK(Distiller):
    """Reconstruct the teacher's map from the student's, of which as much is the teacher's as the two still differ.

    For each level, with ``N`` tokens and a random set ``R`` of them::

        pi  = clip(1 - CKA(F_S, F_T), 0, 1)            centred kernel alignment, unbiased, linear kernel; no gradient
        z_n = z_T,n  for n in R,  else z_S,n           |R| = round(pi N)
        L   = mean over B, C_T, h, w of (Dec(Enc(z)) - F_T)^2

    summed over the levels. While the student is far from the teacher it is given a large part of the answer, and less
    and less as it comes nearer. Encoder and decoder are gone after training; see
    :class:`~kd_dense.connectors.dpk.PriorReconstruction`.

    Source: Qiu et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge Distillation", ICLR 2023,
    arXiv 2206.06067. There is no public code. That teacher's tokens fill masked ones of the student, that their share
    follows the gap between the two for each batch, and the estimator of CKA are confirmed by the abstract and the
    authors' published replies to reviewers; all else is UNCONFIRMED. Four decisions are ours, each with its switch:

    1. The share is one minus CKA, clipped (plots by the authors agree); ``fixed_ratio`` sets it by hand.
    2. What lies between the two maps: tokens of 32 pixels, width 128 (half of a usual pyramid; on BCCD half of the
       teacher's width did as well as all of it, ``docs/results.md``), two transformer blocks in the encoder and in the
       decoder, mixed before the encoder: ``token_size`` or ``patch``, ``width``, ``depth``, ``heads``, ``stitch``.
    3. What is compared: all cells, after layer norm of the teacher's channels: ``region``, ``target_norm``. The norm of
       the target has no weights, because a trained one could make the target constant. The loss of logits that the
       paper may add is left out; put :class:`~kd_dense.distillers.logit_kd.LogitKD` beside it.
    4. What CKA is over. The estimate of a batch of images is useless for the two images of a detector (its standard
       deviation is 0.7 for four), so it is over 256 random cells of the level, of the images of all processes, and
       smoothed: ``examples``, ``samples``, ``min_samples``, ``ratio_ema``. For classification: ``'images'`` and 0.

    Where CKA can not be estimated the share stays what it was, and before the first estimate it is ``initial_ratio``.
    The shares are in the buffer ``ratios``, one for each level, and how often a level had no token of the student left,
    and so gave it no gradient, is in ``saturated``; both are part of a checkpoint's distillation state.

    Args:
        taps: maps; backbones without a neck: the last three stages, ``['backbone:1', 'backbone:2', 'backbone:3']``.
        token_size: side of a token in pixels: the patch is that over the stride, at least 1.
        patch: cells per side of a token instead, one number or one for each level.
        width, depth, heads, stitch: of the encoder and decoder.
        region: ``'all'``, or ``'student_only'``: cells of tokens that came from the student.
        target_norm: compare with the teacher's map after layer norm over its channels.
        fixed_ratio: share of the teacher's tokens, 0..1, 1 excluded; ``None``: from CKA.
        ratio_ema: weight of the former share in the new one, 0..1, 1 excluded; 0: each batch for itself.
        initial_ratio: the share before the first estimate, 0..1.
        max_ratio: upper limit of the estimate, 0..1.
        examples: of CKA: ``'cells'`` or ``'images'`` (the maps of an image as one vector).
        samples: cells that CKA is taken over, at most.
        min_samples: with fewer examples the share stays what it was; at least 4.
        shared_mask: draw one set of tokens for the batch, not one for each image.
        use_mask: leave padding and ignored pixels out: of CKA, of the loss, of what tokens look at, and of ``N``.
        seed: of the sets, which are drawn from it, the iteration and the process, never from the random state of the
            student.
    """

    def __init__(
        self,
        taps: TapConfig = 'neck',
        token_size: int = 32,
        patch: int | Sequence[int] | None = None,
        width: int = 128,
        depth: Sequence[int] = (2, 2),
        heads: int = 4,
        stitch: str = 'before_encoder',
        region: str = 'all',
        target_norm: bool = True,
        fixed_ratio: float | None = None,
        ratio_ema: float = 0.9,
        initial_ratio: float = 0.5,
        max_ratio: float = 1.0,
        examples: str = 'cells',
        samples: int = 256,
        min_samples: int | None = None,
        shared_mask: bool = False,
        use_mask: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, known in (('region', region, REGIONS), ('examples', examples, EXAMPLES)):
            if value not in known:
                raise ConfigError(f'{name} must be one of {list(known)}, not {value!r}')
        shares = {
            'initial_ratio': (initial_ratio, True),
            'max_ratio': (max_ratio, True),
            'ratio_ema': (ratio_ema, False),
        }
        if fixed_ratio is not None:
            shares['fixed_ratio'] = fixed_ratio, False
        for name, (value, closed) in shares.items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1 or (value == 1 and not closed):
                raise ConfigError(f'{name} must lie in 0..1{"" if closed else ", 1 excluded"}, not {value!r}')
        if min_samples is None:
            min_samples = 64 if examples == 'cells' else LEAST
        for name, value, least in (
            ('token_size', token_size, 1),
            ('samples', samples, LEAST),
            ('min_samples', min_samples, LEAST),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f'{name} must be a whole number >= {least}, not {value!r}')
        if len(depth) != 2 or any(not isinstance(n, int) or n < 0 for n in depth):
            raise ConfigError(f'depth: needs two whole numbers >= 0, of the encoder and the decoder, not {depth!r}')
        self.taps = {'features': TapPair.parse(taps)}
        self._parts = dict(width=width, depth=tuple(depth), heads=heads, stitch=stitch)
        self._patch, self.token_size = patch, token_size
        self.region, self.target_norm, self.shared_mask, self.use_mask = region, target_norm, shared_mask, use_mask
        self.fixed_ratio, self.ratio_ema, self.initial_ratio = fixed_ratio, ratio_ema, initial_ratio
        self.max_ratio, self.examples, self.samples, self.min_samples = max_ratio, examples, samples, min_samples
        self.seed = seed
        self.connectors = nn.ModuleList()
        self._fewest: list[int] = []

    def setup(self, student: Probe, teacher: Probe) -> None:
        shapes = paired_shapes(student, teacher, 'features')
        if any(len(x) != 4 for pair in shapes for x in pair):
            raise ConfigError(
                f'taps: DPK takes maps [B, C, h, w], not {describe(student, "features")} (student) and '
                f'{describe(teacher, "features")} (teacher)'
            )
        for (s, t), patch in zip(shapes, self._patches(student), strict=True):
            self.connectors.append(PriorReconstruction(s[1], t[1], patch, **self._parts))
        start = self.initial_ratio if self.fixed_ratio is None else self.fixed_ratio
        self.register_buffer('ratios', torch.full((len(shapes),), float(start)))
        self.register_buffer('saturated', torch.zeros(len(shapes), dtype=torch.int64))

    def _patches(self, student: Probe) -> list[int]:
        strides = student.strides('features')
        if self._patch is None:
            return [max(1, round(self.token_size / stride)) for stride in strides]
        patches = [self._patch] * len(strides) if isinstance(self._patch, int) else list(self._patch)
        if len(patches) != len(strides) or any(not isinstance(p, int) or p < 1 for p in patches):
            raise ConfigError(
                f'patch: needs a whole number >= 1, or one for each of {len(strides)} levels, not {patches}'
            )
        return patches

    # -- one step ------------------------------------------------------------------------------------------------------

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        levels = [
            (s, match_size(t.detach(), s), context.mask(s.shape[2:]) if self.use_mask else None)
            for s, t in zip(student['features'], teacher['features'], strict=True)
        ]
        generator = torch.Generator(levels[0][0].device).manual_seed(step_seed(self.seed, context.iteration))
        if self.fixed_ratio is None:
            self._update_ratios(levels, generator)
        self._fewest = []
        losses = [self._level(i, *level, generator) for i, level in enumerate(levels)]
        return {'loss': sum(losses)}

    def _level(self, level: int, s: Tensor, t: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        connector = self.connectors[level]
        grid = connector.grid(s.shape[2:])
        self._fewest.append(grid[0] * grid[1])
        tokens = None if mask is None else F.max_pool2d(mask.float(), connector.patch, ceil_mode=True).flatten(1) > 0
        replaced, full = self._draw(level, len(s), grid, tokens, generator)
        self.saturated[level] += full
        reconstruction = connector(s, t, replaced, tokens)
        if self.region == 'student_only':
            own = ~replaced.view(-1, 1, grid[0], 1, grid[1], 1)
            own = own.expand(-1, -1, -1, connector.patch, -1, connector.patch).flatten(4, 5).flatten(2, 3)
            own = own[..., : s.shape[2], : s.shape[3]]
            mask = own if mask is None else own & mask
        return mse(reconstruction, self.target(t), mask)

    def target(self, t: Tensor) -> Tensor:
        """What is to be reconstructed of the teacher's map ``[B, C, h, w]``."""
        if not self.target_norm:
            return t
        return F.layer_norm(at_least_fp32(t).movedim(1, -1), t.shape[1:2]).movedim(-1, 1)

    @torch.no_grad()
    def _draw(
        self, level: int, batch: int, grid: tuple[int, int], tokens: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Boolean ``[B, N]``: exactly ``round(pi N)`` random tokens of each image; and: are they all of them?

        The tokens are ranked by random numbers, and those of low rank are taken, so that the number of them need not be
        known on the host. Tokens outside the mask rank last.
        """
        total = grid[0] * grid[1]
        chance = torch.rand(1 if self.shared_mask else batch, total, device=self.ratios.device, generator=generator)
        chance = chance.expand(batch, total)
        if tokens is None:
            wanted = (self.ratios[level] * total).round()
            full = wanted == total
        else:
            chance, count = chance.where(tokens, torch.inf), tokens.sum(1, keepdim=True)
            wanted = (self.ratios[level] * count).round()
            full = (wanted == count).all()
        return chance.argsort(1).argsort(1) < wanted, full

    @torch.no_grad()
    def _update_ratios(self, levels: list[tuple[Tensor, Tensor, Tensor | None]], generator: torch.Generator) -> None:
        terms = torch.stack([self._similarity(s, t, mask, generator) for s, t, mask in levels])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(terms)
        estimate = (1 - cka(terms)).clamp(0, self.max_ratio).to(self.ratios.dtype)
        smoothed = self.ratio_ema * self.ratios + (1 - self.ratio_ema) * estimate
        self.ratios.copy_(torch.where(estimate.isfinite(), smoothed, self.ratios))

    def _similarity(self, s: Tensor, t: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        if self.examples == 'images':
            return hsic_terms(*(zero_outside(x, mask).flatten(1) for x in (s, t)), least=self.min_samples)
        cells = s.shape[2] * s.shape[3]
        chance = torch.rand(len(s) * cells, device=s.device, generator=generator)
        if mask is not None:
            chance = chance.where(mask.flatten(), -1.0)
        drawn = chance.topk(min(self.samples, len(chance)))
        image, place = drawn.indices // cells, drawn.indices % cells
        x, y = (x.flatten(2)[image, :, place] for x in (s, t))
        return hsic_terms(x, y, None if mask is None else drawn.values >= 0, self.min_samples)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Those of the side that may have given no token in a first step, which its size or the options decide."""
        if self.fixed_ratio is None:
            lowest = self.ratio_ema * self.initial_ratio
            highest = lowest + (1 - self.ratio_ema) * self.max_ratio
            # where there is no estimate the first share is the initial one
            lowest, highest = min(lowest, self.initial_ratio), max(highest, self.initial_ratio)
        else:
            lowest = highest = self.fixed_ratio
        idle: list[nn.Parameter] = []
        for connector, tokens in zip(self.connectors, self._fewest):
            if round(lowest * tokens) == 0:
                idle += connector.side('teacher')
            if round(highest * tokens) == tokens:
                idle += connector.side('student')
        return idle
