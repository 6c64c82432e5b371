"""Transformer-to-transformer distillation of feature maps and patch embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_dense.connectors import CSF, EA, PEA, GLMixer, as_grid, as_tokens, match_size
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe
from kd_dense.distillers.feature_mimic import mask_for
from kd_dense.errors import ConfigError
from kd_dense.losses import hcl, mse
from kd_dense.registry import DISTILLERS

VARIANTS = ('base', 'gl', 'ea')


@DISTILLERS.register_module()
class TransKD(Distiller):
    """Match the stage maps and the patch embeddings of two hierarchical transformers.

    ``feature_loss = feature_weight * sum_m HCL(O_m, F_m^T)``: the student's stage maps go through a top-down chain
    (:class:`~kd_dense.connectors.CSF`) and are compared with the teacher's at several resolutions
    (:func:`~kd_dense.losses.hcl`). ``embedding_loss = sum_m alpha_m MSE(P_m, E_m^T)``: the tokens that enter each stage
    are brought to the teacher's width (:class:`~kd_dense.connectors.PEA`). The variants differ in ``P_m``:

    * ``'base'``: ``P_m = PEA(E_m^S)``;
    * ``'gl'``: before the PEA of the deepest stage, attention over all tokens and a gated convolution
      (:class:`~kd_dense.connectors.GLMixer`);
    * ``'ea'``: ``P_m = w_m PEA(E_m^S) + v_m EA_m``, where ``EA_m`` is a patch embedding of the teacher's width
      (:class:`~kd_dense.connectors.EA`) of the student's map of the stage before, for the first stage of the image.

    Source: Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", IEEE T-ITS
    2024 (arXiv 2202.13393), and the authors' code, from which the equations and the defaults are. The start of the GL
    gates is UNCONFIRMED (their code leaves it to uninitialised memory); 1 and 1 is our reading. Gradients are kept from
    the teacher, which their code computes and drops. Masks are ours: their code has none (``use_mask=False``). Their
    published numbers of parameters contain the connectors; ours go with the training. Convolutional models have maps
    but no patch embeddings: ``embeddings=None`` leaves CSF and HCL.

    The authors' LVT student is tapped before the norm of its patch embeddings; ``embeddings`` may name such a place
    (``backbone.layers.0.0.projection``), maps and tokens are both understood. Swin's tokens after the first stage are
    not normalised either: there its norm comes before the reduction.

    A teacher that sees larger or smaller images (``teacher.scale``) has other sizes: its maps, and its tokens as maps,
    are resized to the student's.

    Args:
        variant: ``'base'``, ``'gl'`` or ``'ea'``.
        taps: the maps of all stages, shallow to deep, after their last norm.
        embeddings: the tokens that enter each of these stages, in the same order. ``'patch_embeddings'`` finds them in
            MiT, PVTv2 and Swin. ``None``: feature maps only.
        feature_weight: of the feature loss; 0 leaves it out.
        embedding_weights: ``alpha``, one for each stage; 0 leaves a stage out.
        levels: of the HCL.
        mid_channels, reduction, min_channels, single_sample_branch: of the CSF. ``single_sample_branch='fc1'``, as in
            the authors' code, trains a branch of its own with batches of one image (per process), and the other with
            larger batches; the idle one gets no gradient, or in distributed training one of 0.
        heads, gates, residual: of the GL-Mixer.
        pea_weights, ea_weights: initial ``w`` and ``v``, one for each stage, learned without limits; ``None``:
            ``0.1, 0.2, ...`` on through both, as the authors have it (0.1 to 0.4 and 0.5 to 0.8).
        image_channels: of the student's input, for the first EA.
        use_mask: leave padding and ignored pixels out.
    """

    matches_levels = False  # its stages are counted, and one that has no counterpart is named

    def __init__(
        self,
        variant: str = 'base',
        taps: TapConfig = 'backbone',
        embeddings: TapConfig | None = 'patch_embeddings',
        feature_weight: float = 1.0,
        embedding_weights: Sequence[float] = (0.1, 0.1, 0.5, 1.0),
        levels: Sequence[int] = (4, 2, 1),
        mid_channels: int = 64,
        reduction: int = 16,
        min_channels: int = 32,
        single_sample_branch: str = 'fc1',
        heads: int = 8,
        gates: Sequence[float] = (1.0, 1.0),
        residual: bool = False,
        pea_weights: Sequence[float] | None = None,
        ea_weights: Sequence[float] | None = None,
        image_channels: int = 3,
        use_mask: bool = True,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ConfigError(f'variant must be one of {", ".join(map(repr, VARIANTS))}, not {variant!r}')
        weights = [feature_weight, *(embedding_weights if embeddings is not None else ())]
        if not all(w >= 0 for w in weights) or not any(weights):
            raise ConfigError(
                f'feature_weight and embedding_weights must be >= 0, and one of them more, not {feature_weight!r} and '
                f'{embedding_weights!r}'
            )
        if embeddings is None and variant != 'base':
            raise ConfigError(f"variant={variant!r} works on patch embeddings; with embeddings=None choose 'base'")
        self.taps = {'features': TapPair.parse(taps)}
        if embeddings is not None:
            self.taps['embeddings'] = TapPair.parse(embeddings)
        self.variant, self.image_channels, self.use_mask = variant, image_channels, use_mask
        self.feature_weight, self.embedding_weights = float(feature_weight), [float(w) for w in embedding_weights]
        self.levels = tuple(levels)
        self._csf = dict(
            mid_channels=mid_channels,
            reduction=reduction,
            min_channels=min_channels,
            single_sample_branch=single_sample_branch,
        )
        self._mixer = dict(heads=heads, gates=gates, residual=residual)
        self._initial = pea_weights, ea_weights

    # -- building ------------------------------------------------------------------------------------------------------

    def setup(self, student: Probe, teacher: Probe) -> None:
        maps = self._paired(student, teacher, 'features')
        for stage, (s, t) in enumerate(zip(student.strides('features'), teacher.strides('features'), strict=True), 1):
            if s is None or t is None:
                side = 'student' if s is None else 'teacher'
                raise ConfigError(f'taps: stage {stage} of the {side} is no map [B, C, h, w]; tap the backbone itself')
            if not 0.7 < s / t < 1.4:
                raise ConfigError(
                    f'taps: stage {stage} has stride {s:g} in the student and {t:g} in the teacher; choose models, or '
                    'stages with NAME:INDEX, of equal strides'
                )
        widths = [[s[1] for s, _ in maps], [t[1] for _, t in maps]]
        self.csf = CSF(*widths, **self._csf) if self.feature_weight else None
        if 'embeddings' in self.taps:
            self._setup_embeddings(student, teacher)

    def _setup_embeddings(self, student: Probe, teacher: Probe) -> None:
        pairs = self._paired(student, teacher, 'embeddings')
        count = len(student.shapes['features'])
        if len(pairs) != count:
            raise ConfigError(
                f'embeddings: {len(pairs)} patch embeddings do not go with the maps of {count} stages; give one for '
                'each stage, shallow to deep'
            )
        if len(self.embedding_weights) != count:
            raise ConfigError(
                f'embedding_weights: has {len(self.embedding_weights)} numbers, but there are {count} stages'
            )
        for side, probe in (('student', student), ('teacher', teacher)):
            for stage, (tokens, grid) in enumerate(
                zip(probe.shapes['embeddings'], probe.shapes['features'], strict=True), 1
            ):
                self._check_grid(side, stage, tokens, grid)
        used = [i for i, weight in enumerate(self.embedding_weights) if weight]
        widths = [[_width(x) for x in pair] for pair in pairs]
        self.pea = nn.ModuleDict({str(i): PEA(*widths[i]) for i in used})
        if self.variant == 'gl':
            if not self.embedding_weights[-1]:
                raise ConfigError("embedding_weights: variant='gl' works on the last stage, whose weight is 0")
            self.mixer = GLMixer(widths[-1][0], **self._mixer)
        if self.variant == 'ea':
            self._setup_assistants(student, [t for _, t in widths], used)

    def _setup_assistants(self, student: Probe, widths: list[int], used: list[int]) -> None:
        count = len(widths)
        self.ea = nn.ModuleDict()
        below, channels = student.canvas, self.image_channels
        for i, shape in enumerate(student.shapes['features']):
            stride = 2 ** max(round(math.log2(below[0] / shape[2])), 0)
            if tuple(shape[2:]) != tuple(-(-x // stride) for x in below):
                raise ConfigError(
                    f"taps: variant='ea' can not embed {below[0]} x {below[1]} positions as the {shape[2]} x "
                    f"{shape[3]} of the student's stage {i + 1}; choose 'base' or 'gl'"
                )
            if i in used:
                self.ea[str(i)] = EA(channels, widths[i], stride)
            below, channels = tuple(shape[2:]), shape[1]
        steps = [0.1 * (i + 1) for i in range(2 * count)]
        defaults = steps[:count], steps[count:]
        for name, given, default in zip(('pea_weights', 'ea_weights'), self._initial, defaults, strict=True):
            values = default if given is None else [float(v) for v in given]
            if len(values) != count or not all(values):
                raise ConfigError(f'{name}: needs {count} numbers other than 0, one for each stage, not {given!r}')
            setattr(self, name, nn.Parameter(torch.tensor(values)))

    @staticmethod
    def _paired(student: Probe, teacher: Probe, role: str) -> list[tuple[torch.Size, torch.Size]]:
        s, t = student.shapes[role], teacher.shapes[role]
        if len(s) != len(t):
            key, more, fewer = 'taps' if role == 'features' else role, 'student', 'teacher'
            if len(s) < len(t):
                more, fewer = fewer, more
            raise ConfigError(
                f'{key}: stage {min(len(s), len(t)) + 1} of the {more} has no counterpart: the student gives '
                f'{describe(student, role)}, the teacher {describe(teacher, role)}; let the {fewer} give as many '
                '(out_indices of its backbone), or choose stages with NAME:INDEX'
            )
        return list(zip(s, t, strict=True))

    @staticmethod
    def _check_grid(side: str, stage: int, tokens: Sequence[int], grid: Sequence[int]) -> None:
        """Do the ``tokens`` of a stage lie on the grid of its map?"""
        h, w = grid[2:]
        size = tokens[2] * tokens[3] if len(tokens) == 4 else tokens[1]
        if len(tokens) not in (3, 4) or size != h * w:
            shape = ', '.join(['B', *map(str, tokens[1:])])
            raise ConfigError(
                f'embeddings: [{shape}] of the {side} in stage {stage} is no grid of {h} x {w} tokens, which the map '
                'of that stage has; tap the patch embedding of the same stage, without class tokens'
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = {}
        if self.csf is not None:
            terms = []
            for s, t in zip(self.csf(student['features']), teacher['features'], strict=True):
                terms.append(hcl(s, match_size(t, s), mask_for(s, context, self.use_mask), self.levels))
            losses['feature_loss'] = self.feature_weight * sum(terms)
        if 'embeddings' in self.taps:
            terms = []
            for i, tokens in self.embedded(student, context).items():
                s = as_grid(tokens, student['features'][i].shape[2:])
                t = as_grid(as_tokens(teacher['embeddings'][i]), teacher['features'][i].shape[2:])
                loss = mse(s, match_size(t, s), mask_for(s, context, self.use_mask))
                terms.append(self.embedding_weights[i] * loss)
            if terms:
                losses['embedding_loss'] = sum(terms)
        return losses

    def embedded(self, student: dict[str, list[Tensor]], context: Context) -> dict[int, Tensor]:
        """Stage (from 0) -> ``P_m`` ``[B, N_m, C_m^T]``, for the stages whose weight is not 0."""
        found = {}
        for key, pea in self.pea.items():
            i = int(key)
            tokens = as_tokens(student['embeddings'][i])
            if self.variant == 'gl' and i == len(student['embeddings']) - 1:
                tokens = self.mixer(tokens)
            tokens = pea(tokens)
            if self.variant == 'ea':
                below = student['features'][i - 1] if i else context.image
                if below is None:
                    raise ConfigError("variant='ea' needs the student's images, which this toolbox does not hand on")
                tokens = self.pea_weights[i] * tokens + self.ea_weights[i] * as_tokens(self.ea[key](below))
            found[i] = tokens
        return found


def _width(shape: Sequence[int]) -> int:
    """Channels of tokens ``[B, N, C]`` or of a map ``[B, C, h, w]``."""
    return shape[1] if len(shape) == 4 else shape[2]
