"""Cross-architecture distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kd_dense.attention import heads_of
from kd_dense.connectors import match_size
from kd_dense.connectors.cakd import ConvQKV, GroupwiseLinear, LinearQKV
from kd_dense.connectors.token_layout import TokenLayout, to_grid
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.adversary import Adversary, PatchDiscriminator, TokenDiscriminator
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe, paired_shapes
from kd_dense.distillers.multi_view import MultiView
from kd_dense.errors import ConfigError, closest
from kd_dense.losses import mse
from kd_dense.losses.cakd import attention_loss, mean_scores, pairs, score_loss, value_loss
from kd_dense.losses.reduction import at_least_fp32, masked_mean
from kd_dense.registry import DISTILLERS, check_arguments


@dataclass(frozen=True)
class Profile:
    """What one description of the method has that the other has not.

    Args:
        terms: weights inside the method.
        views: does the student see changed images?
        logits: tap names of the class logits to be compared.
        dropout: in front of the group-wise linear layers.
        adversary: of :class:`~kd_dense.distillers.adversary.Adversary`, where it differs from the default.
        loss_weight: of the whole method, with its schedule.
    """

    terms: Mapping[str, float]
    views: bool
    logits: str | None
    dropout: float
    adversary: Mapping[str, float] = field(default_factory=dict)
    loss_weight: float | Mapping = 1.0


PROFILES = {
    'paper': Profile(
        terms=dict(attention=1.0, value=1.0, features=1.0, adversarial=0.1), views=True, logits=None, dropout=0.1
    ),
    'code': Profile(
        terms=dict(attention=0.2, value=0.05, features=0.05, adversarial=1.0, logits=1.0, token=1.0),
        views=False,
        logits='logits',
        dropout=0.0,
        adversary=dict(interval=1, factor=0.5),
        # nothing in the first 25 of 120 epochs, 0.2 from the 35th
        loss_weight=dict(value=0.2, start=25 / 120, warmup=10 / 120),
    ),
}
#: Grids for which the public code has one layer per tile; it shares one layer on all others.
_TILED = ((14, 14), (7, 7))


@DISTILLERS.register_module()
class CAKD(Distiller):
    """Teach a CNN from a transformer in the space of its attention, and position by position in that of its tokens.

    ``x`` is a map of the student, resized to the grid of a teacher's stage, ``Q, K, V`` are the matrices of one
    attention module of that stage and ``F_T`` its output map::

        Q_S, K_S, V_S = three 3x3 convolutions of x                       (partially cross attention projector)
        L_attention   = mean (softmax(g(Q_S) g(K_S)^T / sqrt d) g(V_S) - softmax(Q_T K_T^T / sqrt d) V_T)^2
        L_value       = mean (V_S V_S^T / sqrt d - V_T V_T^T / sqrt d)^2
        L_features    = mean (one linear layer per neighbourhood of x - F_T)^2           (group-wise linear projector)
        L_adversarial = mean -log D(projected x)                                         (multi-view robust training)

    ``g`` replaces each element by the teacher's with probability ``replace_prob``. While the student is trained like
    this it sees randomly changed images and the teacher the clean ones, see
    :class:`~kd_dense.distillers.multi_view.MultiView`; the discriminator ``D`` is trained beside it, with an optimizer
    of its own. Projectors, ``D`` and views are gone after training.

    Source: Liu et al., "Cross-Architecture Knowledge Distillation", ACCV 2022, arXiv 2207.05273, equations 1 to 10, and
    the authors' public code, which differs from the paper in nearly every part:

    * ``profile='paper'``: the equations, all of them means. The paper does not give: the weight of the adversarial
      term (0.1 here), whether attention is multi-head (here it is, with the teacher's heads), the layers of ``D``, the
      place and rate of the dropout (0.1, on the input of the linear layers), the strength of the views, and whether
      ``D`` is trained every five iterations (here) or epochs. Classification is all it describes; its detection
      results come without a recipe.
    * ``profile='code'``: one bias-free linear projection into ``heads`` heads, no replacement, scores before the
      softmax, averaged over heads; the teacher's ``V V^T`` is not scaled; logits are compared too, and class tokens
      where ``token`` is given; ``D`` is a convolutional network on the scores; the weight rises from 0 to 0.2 between
      25/120 and 35/120 of the training. The public code detaches what goes into ``D``, so that its adversarial term
      trains nobody; here it trains both. ``adversary=False`` gives what the public code amounts to.

    The adaptation to dense prediction is ours: keys and values are averaged where the teacher reduces them (MiT, PVT),
    the student's matrices are cut into the teacher's windows, and get its position bias (Swin), and tokens of padding
    and ignored pixels do not count. Where windows reach beyond the map, the student has the teacher's tokens, which do
    not count either.

    Args:
        attention: path of the teacher's attention module: ``backbone.layers.3.1.2.attn.attn`` (MiT and PVT: the last
            block of the last stage, here of B2; that stage has no reduction),
            ``backbone.stages.3.blocks.0.attn.w_msa`` (Swin: an even block, whose windows are not shifted),
            ``backbone.layers.11.attn.attn`` (ViT-B).
        taps: map of the student, and output map of that stage of the teacher. Default ``'backbone:3'``.
        profile: ``'paper'`` or ``'code'``.
        terms: weights by term that replace those of the profile: ``attention``, ``value``, ``features``,
            ``adversarial``, ``logits``, ``token``. 0 leaves a term out.
        replace_prob: probability of ``g`` in 0..1, profile ``paper``.
        kernel_size: of the three convolutions, profile ``paper``.
        heads: of the student, profile ``code``; has to divide the channels of its map.
        linear: ``dict(mode, tile, dropout)`` of :class:`~kd_dense.connectors.cakd.GroupwiseLinear`. ``'tile'`` (the
            paper) needs training images of one size; with several, as in detection, choose ``'grid'`` or ``'shared'``.
        views: ``dict`` of the options of :class:`~kd_dense.distillers.multi_view.MultiView`, or ``False``; ``None``: on
            in profile ``paper``, off in ``code``.
        adversary: ``dict(optimizer, lr_mult, interval, form)`` of :class:`~kd_dense.distillers.adversary.Adversary`, or
            ``False``; ``None``: on.
        logits: taps of logits with the same classes on both sides, or ``False``; ``None``: ``'logits'`` in profile
            ``code``, none in ``paper``.
        token: ``dict(student=..., teacher=...)``: a map of the student whose mean is projected, and tokens of the
            teacher of which the first is the class token (or a vector); the dense backbones give none by default.
        use_mask: leave tokens of padding and ignored pixels out.
    """

    def __init__(
        self,
        attention: str,
        taps: TapConfig = 'backbone:3',
        profile: str = 'paper',
        terms: Mapping[str, float] | None = None,
        replace_prob: float = 0.5,
        kernel_size: int = 3,
        heads: int = 16,
        linear: Mapping | None = None,
        views: Mapping | bool | None = None,
        adversary: Mapping | bool | None = None,
        logits: TapConfig | bool | None = None,
        token: TapConfig | None = None,
        use_mask: bool = True,
    ) -> None:
        super().__init__()
        if profile not in PROFILES:
            raise ConfigError(f'profile must be one of {list(PROFILES)}, not {profile!r}')
        if not isinstance(attention, str) or not attention:
            raise ConfigError(f"attention: must be the path of one of the teacher's modules, not {attention!r}")
        if not isinstance(replace_prob, (int, float)) or not 0 <= replace_prob <= 1:
            raise ConfigError(f'replace_prob must lie in 0..1, not {replace_prob!r}')
        if not isinstance(kernel_size, int) or kernel_size % 2 != 1:
            raise ConfigError(f'kernel_size must be odd, not {kernel_size!r}')
        self.profile, defaults = profile, PROFILES[profile]
        self.default_loss_weight = defaults.loss_weight
        self.replace_prob, self.kernel_size, self.heads, self.use_mask = replace_prob, kernel_size, heads, use_mask
        self.taps = {
            'features': TapPair.parse(taps),
            'attention': TapPair((), (f'{attention.removesuffix("@qkv")}@qkv',)),
        }
        self.terms = _terms(defaults.terms, terms)
        self._linear = {'dropout': defaults.dropout, **_options(linear, True, GroupwiseLinear, 'linear')}
        self._views = _options(views, defaults.views, MultiView, 'views')
        self._adversary = _options(adversary, True, Adversary, 'adversary')
        if self._adversary is not None:
            self._adversary = {**defaults.adversary, **self._adversary} if self.terms['adversarial'] else None
        logits = defaults.logits if logits is None else logits
        for role, tap in (('logits', logits), ('token', token)):
            if tap and self.terms.get(role) != 0:
                self.taps[role] = TapPair.parse(tap)
                self.terms.setdefault(role, 1.0)
        if self._views is not None:
            MultiView(**self._views)  # so that a wrong option is known before anything is loaded
        self.views: MultiView | None = None
        self.projector = self.linear = self.token = self.adversary = None

    # -- building ------------------------------------------------------------------------------------------------------

    def setup(self, student: Probe, teacher: Probe) -> None:
        shapes = paired_shapes(student, teacher, 'features')
        if len(shapes) != 1 or any(len(shape) != 4 for shape in shapes[0]):
            raise ConfigError(
                f'taps: needs one map of each side, not {describe(student, "features")} (student) and '
                f'{describe(teacher, "features")} (teacher)'
            )
        ((_, width, *_), (batch, teacher_width, *grid)) = shapes[0]
        q, k, *rest = teacher.shapes['attention']
        layout = TokenLayout(grid, q, k, batch, windowed=len(rest) > 1)
        self.projector = self._make_projector(width, q[1] * q[3])
        self.linear = self._make_linear(width, teacher_width, grid)
        if 'logits' in self.taps:
            for s, t in paired_shapes(student, teacher, 'logits'):
                if s[1] != t[1]:
                    raise ConfigError(f'logits: the student has {s[1]} channels of logits and the teacher {t[1]}')
        if 'token' in self.taps:
            self.token = nn.Linear(student.shapes['token'][0][1], teacher.shapes['token'][0][-1])
        if self._adversary is not None:
            self.adversary = Adversary(self._make_discriminator(teacher_width, layout, q, k), **self._adversary)
        if self._views is not None:
            self.views = MultiView(student.normalization, **self._views)

    def _make_projector(self, width: int, teacher_width: int) -> nn.Module | None:
        if not self.terms['attention'] and not self.terms['value']:
            return None
        if self.profile == 'paper':
            return ConvQKV(width, teacher_width, self.kernel_size)
        if not isinstance(self.heads, int) or self.heads < 1 or width % self.heads:
            raise ConfigError(f"heads: {self.heads!r} does not divide the {width} channels of the student's map")
        return LinearQKV(width)

    def _make_linear(self, width: int, teacher_width: int, grid: list[int]) -> nn.Module | None:
        if not self.terms['features']:
            if self.profile == 'paper' and self._adversary is not None:
                raise ConfigError("terms: the adversary looks at the projected features, so 'features' can not be 0")
            return None
        options = dict(self._linear)
        if self.profile == 'code' and tuple(grid) not in _TILED:
            options.setdefault('mode', 'shared')
        return GroupwiseLinear(width, teacher_width, grid, **options)

    def _make_discriminator(self, width: int, layout: TokenLayout, q: list[int], k: list[int]) -> nn.Module:
        if self.profile == 'paper':
            return TokenDiscriminator(width)
        smallest = min(q[2], k[2]) - layout.class_tokens
        if self.projector is None or smallest < PatchDiscriminator.smallest:
            least = PatchDiscriminator.smallest
            raise ConfigError(
                f"adversary: in profile 'code' it looks at the scores of {least} tokens or more, and here there are "
                f'{smallest}; set adversary=False'
            )
        return PatchDiscriminator()

    # -- one step ------------------------------------------------------------------------------------------------------

    def view(self, images: Tensor, context: Context) -> Tensor:
        return self.views(images, context) if self.views is not None and self.training else images

    def after_step(self, lr: float) -> None:
        if self.adversary is not None:
            self.adversary.after_step(lr)

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        (target,) = teacher['features']
        x = to_grid(student['features'][0], target.shape[-2:])
        losses: dict[str, Tensor] = {}
        judged = None  # what the discriminator compares: the teacher's, the student's, which of them count
        if self.projector is not None:
            compare = self._compare_outputs if self.profile == 'paper' else self._compare_scores
            losses['attention'], losses['value'], judged = compare(x, teacher['attention'], target, context)
        if self.linear is not None:
            projected, mask = self.linear(x), self._mask(context, target.shape[-2:])
            losses['features'] = mse(projected, target, mask)
            if self.profile == 'paper':
                judged = [None if m is None else m.flatten(2).transpose(1, 2) for m in (target, projected, mask)]
        if self.adversary is not None:
            losses['adversarial'] = self.adversary(*judged, context.iteration)
        if 'logits' in self.taps:
            levels = [
                mse(s, match_size(t, s), self._mask(context, s.shape[-2:]))
                for s, t in zip(student['logits'], teacher['logits'], strict=True)
            ]
            losses['logits'] = sum(levels) / len(levels)
        if self.token is not None:
            token = teacher['token'][0]
            token = token[:, 0] if token.dim() == 3 else token
            own = self.token(student['token'][0].flatten(2).mean(-1))
            losses['token'] = masked_mean((at_least_fp32(own) - at_least_fp32(token)).square(), None)
        return {f'{term}_loss': self.terms[term] * value for term, value in losses.items() if self.terms[term]}

    def _compare_outputs(
        self, x: Tensor, teacher: list[Tensor], target: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, None]:
        """Profile ``paper``: outputs of the attention, and relations of the values."""
        *theirs, bias = teacher if len(teacher) == 4 else (*teacher, None)
        layout = self._layout(teacher, target)
        theirs = [layout.places(t) for t in theirs]
        maps = zip(self.projector(x), (layout.queries, layout.keys, layout.keys), strict=True)
        own = [heads_of(arrange(m), theirs[0].shape[1]) for m, arrange in maps]
        if layout.is_padded:
            within = self._tokens(layout.queries, x.new_ones(x.shape[0], 1, *layout.grid))
            own = [s.where(within, t) for s, t in zip(own, theirs, strict=True)]
        rows, columns = self._token_masks(layout, x, context)
        prob = self.replace_prob if self.training else 0.0
        return attention_loss(own, theirs, bias, prob, rows), value_loss(own[2], theirs[2], columns), None

    def _compare_scores(
        self, x: Tensor, teacher: list[Tensor], target: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, tuple]:
        """Profile ``code``: scores before the softmax, means over the heads. A position bias would cancel."""
        layout = self._layout(teacher, target)
        q_t, k_t, v_t = (layout.places(t) for t in teacher[:3])
        q, k, v = self.projector(x)
        q, k, v = (heads_of(tokens, self.heads) for tokens in (layout.queries(q), layout.keys(k), layout.keys(v)))
        scale = q.shape[-1] ** -0.5
        own = mean_scores(q, k, scale), mean_scores(v, v, scale)
        theirs = mean_scores(q_t, k_t, q_t.shape[-1] ** -0.5), mean_scores(v_t, v_t, 1.0)
        rows, columns = self._token_masks(layout, x, context)
        attention = score_loss(own[0], theirs[0], pairs(rows, columns))
        return attention, score_loss(own[1], theirs[1], pairs(columns, columns)), (theirs[0], own[0], None)

    @staticmethod
    def _layout(teacher: list[Tensor], target: Tensor) -> TokenLayout:
        return TokenLayout(
            target.shape[-2:], teacher[0].shape, teacher[1].shape, target.shape[0], windowed=len(teacher) == 4
        )

    def _mask(self, context: Context, size: tuple[int, int]) -> Tensor | None:
        return context.mask(size) if self.use_mask else None

    def _token_masks(self, layout: TokenLayout, x: Tensor, context: Context) -> tuple[Tensor | None, Tensor | None]:
        """Which queries and which keys count, ``[B', 1, N, 1]`` and ``[B', 1, M, 1]``; ``None``: all."""
        rows, columns = (self._mask(context, size) for size in (layout.grid, layout.reduced))
        if rows is None and layout.is_padded:
            rows = columns = x.new_ones(x.shape[0], 1, *layout.grid)
        if rows is None:
            return None, None
        return tuple(self._tokens(layout.queries, m) for m in (rows, columns))

    @staticmethod
    def _tokens(arrange: object, mask: Tensor) -> Tensor:
        return arrange(mask.float())[:, None] > 0


def _terms(defaults: Mapping[str, float], given: Mapping[str, float] | None) -> dict[str, float]:
    known = ('attention', 'value', 'features', 'adversarial', 'logits', 'token')
    for name, weight in (given or {}).items():
        if name not in known:
            raise ConfigError(f'terms: there is no term {name!r}; {closest(name, known)}')
        if not isinstance(weight, (int, float)) or not 0 <= weight < float('inf'):
            raise ConfigError(f'terms.{name}: must be a finite number >= 0, not {weight!r}')
    terms = {**defaults, **(given or {})}
    if bool(terms['attention']) != bool(terms['value']):
        raise ConfigError(
            "terms: 'attention' and 'value' train one projector; leave both out or none, and weigh one down if need be"
        )
    return terms


def _options(given: Mapping | bool | None, default: bool, cls: type, key: str) -> dict | None:
    """The options of a part that may be left out; ``None`` when it is."""
    if given is None or given is True:
        given = {} if given or default else False
    if given is False:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f'{key}: must be a dict of options or False, not {given!r}')
    given = dict(given)
    own = {'in_channels', 'out_channels', 'grid', 'normalization', 'discriminator'}
    check_arguments(cls, given, key, exclude=dict.fromkeys(own))
    return given
