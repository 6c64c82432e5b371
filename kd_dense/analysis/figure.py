"""A comparison as a picture: curves, scores, differences, classes and example images, in one PNG.

Colours are from the Okabe-Ito palette, which colour-blind readers can tell apart; each way of training also has its own
marker. Nothing here needs a display.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from kd_dense.analysis.compare import Comparison, Row

STUDENT, TEACHER = '#E69F00', '#4D4D4D'
VARIANTS = ('#0072B2', '#009E73', '#CC79A7', '#D55E00', '#56B4E9')
MARKERS = ('o', 's', '^', 'D', 'v', 'P')
STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 10,
    'axes.titlesize': 11,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.axisbelow': True,
    'axes.grid': True,
    'grid.color': '#E4E4E4',
    'grid.linewidth': 0.8,
    'legend.frameon': False,
    'legend.fontsize': 9,
    'figure.facecolor': 'white',
    'savefig.dpi': 150,
}
WIDTH = 14.0  # inches
HEADING_CHARACTERS = 170
LEGEND_COLUMNS = 9
MOST_CLASSES = 40
CLASSES_SHOWN = 30  # of more than MOST_CLASSES: those that changed most

Colour = Sequence[float]


def save_figure(
    comparison: Comparison,
    path: str | Path,
    examples: Sequence[Mapping] = (),
    class_colours: Mapping[str, Colour] | None = None,
    examples_title: str = 'Examples',
) -> Path:
    """Draw the comparison into the PNG ``path``.

    Args:
        comparison: from :func:`kd_dense.analysis.compare.compare`.
        path: file to write; its folder is made when missing.
        examples: see :func:`draw_examples`; none: the picture ends with the measurements.
        class_colours: class name -> RGB (0..255) of the colours in the example images, for a legend.
        examples_title: stands above the images.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        heading = '\n'.join(textwrap.fill(sentence, HEADING_CHARACTERS) for sentence in comparison.conclusions())
        heights = [0.55 + 0.2 * heading.count('\n') + 0.2, 4.2]
        classes = _classes_to_show(comparison)
        if classes:
            heights.append(_class_height(comparison, classes))
        if examples:
            heights.append(_examples_height(examples, class_colours))
        figure = Figure(figsize=(WIDTH, sum(heights)), layout='constrained')
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06)
        FigureCanvasAgg(figure)
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02))
        _draw_heading(next(parts), comparison, heading)
        axes = next(parts).subplots(1, 3, width_ratios=(1.25, 1, 1))
        draw_curves(axes[0], comparison)
        draw_scores(axes[1], comparison)
        draw_differences(axes[2], comparison)
        if classes:
            draw_classes(next(parts).subplots(), comparison, classes)
        if examples:
            draw_examples(next(parts), examples, class_colours, examples_title, comparison.words.baseline)
        figure.savefig(path, format='png')
    return path


def draw_curves(axes: Axes, comparison: Comparison) -> None:
    """Metric against iteration: mean over seeds, and the band from the lowest to the highest seed."""
    drawn = False
    for row, colour, marker in _styled(comparison):
        # Seeds are averaged where all of them were validated.
        curves = [dict(record.curve) for record in row.records]
        iterations = sorted(set.intersection(*map(set, curves)))
        if not iterations:
            continue
        values = np.array([[curve[i] for i in iterations] for curve in curves])
        axes.fill_between(iterations, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            iterations,
            values.mean(0),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.8,
            label=_label(row, comparison),
        )
        drawn = True
    if not drawn:
        axes.text(0.5, 0.5, 'no validation during training', transform=axes.transAxes, ha='center', va='center')
    if comparison.teacher is not None:
        axes.axhline(comparison.teacher, color=TEACHER, linestyle='--', linewidth=1.5, label=comparison.words.reference)
    count = len(comparison.seeds)
    axes.set_title('Validation during training' + (f' (mean, range of {count} seeds)' if count > 1 else ''))
    axes.set_xlabel('iteration')
    axes.set_ylabel(f'{comparison.metric} (%)')
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if drawn or comparison.teacher is not None:
        axes.legend(loc='lower right')


def draw_scores(axes: Axes, comparison: Comparison) -> None:
    """Bars of the mean score from 0, with a point per seed and the mean as a number."""
    bars = [(_label(row, comparison), row.mean, row.values, *style) for row, *style in _styled(comparison)]
    if comparison.teacher is not None:
        bars.append((comparison.words.reference, comparison.teacher, (), TEACHER, ''))
    top = max(max([mean, *values]) for _, mean, values, _, _ in bars)
    for x, (_, mean, values, colour, marker) in enumerate(bars):
        axes.bar(x, mean, width=0.68, color=colour, alpha=0.85)
        axes.plot(x + _spread(len(values)), values, marker, color='white', markeredgecolor='black', markersize=5)
        highest = max([mean, *values])
        axes.text(x, highest + 0.025 * top, f'{mean:.2f}', ha='center', va='bottom', fontweight='bold')
    _name_ticks(axes, [bar[0] for bar in bars])
    axes.set_ylim(0, 1.12 * top if top > 0 else 1)
    axes.grid(axis='x', visible=False)
    axes.set_title('Final score (points: seeds)')
    axes.set_ylabel(f'{comparison.metric} (%)')


def draw_differences(axes: Axes, comparison: Comparison) -> None:
    """Paired differences to the baseline: a point per seed, the mean, its 95 % interval and the line at 0."""
    axes.axhline(0, color=STUDENT, linewidth=2)
    for x, (row, colour, marker) in enumerate(list(_styled(comparison))[1:]):
        difference = row.difference
        if len(difference.values) > 1:
            at = x - 0.17 + _spread(len(difference.values))
            axes.plot(at, difference.values, marker, color='white', markeredgecolor=colour, markersize=6)
        error = None
        if difference.interval:
            error = [[difference.mean - difference.interval.low], [difference.interval.high - difference.mean]]
        axes.errorbar(
            x + 0.12, difference.mean, error, fmt=marker, color=colour, markersize=8, capsize=6, linewidth=2, capthick=2
        )
        top = difference.interval.high if difference.interval else difference.mean
        axes.annotate(
            f'{difference.mean:+.2f}', (x + 0.12, top), (0, 6), textcoords='offset points', ha='center', va='bottom',
            color=colour, fontweight='bold',
        )  # fmt: skip
    axes.set_xlim(-0.6, len(comparison.variants) - 0.4)
    low, high = axes.get_ylim()
    margin = 0.1 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    _name_ticks(axes, [row.name for row in comparison.variants])
    axes.grid(axis='x', visible=False)
    interval = ', 95 % interval' if len(comparison.seeds) > 1 else ' (one seed)'
    axes.set_title('Gain by seed, mean' + interval)
    axes.set_ylabel(f'difference in {comparison.metric} (points)')


def draw_classes(axes: Axes, comparison: Comparison, classes: Sequence[str]) -> None:
    """Bars of each class's mean difference to the baseline, with its 95 % interval."""
    width = 0.8 / len(comparison.variants)
    for k, (row, colour, _) in enumerate(list(_styled(comparison))[1:]):
        shown = [(i, row.per_class[name]) for i, name in enumerate(classes) if name in row.per_class]
        x = [i + (k - (len(comparison.variants) - 1) / 2) * width for i, _ in shown]
        means = [difference.mean for _, difference in shown]
        axes.bar(x, means, 0.92 * width, color=colour, alpha=0.85, label=row.name)
        bounded = [(at, d) for at, (_, d) in zip(x, shown) if d.interval]
        if bounded:
            half = [d.interval.high - d.mean for _, d in bounded]
            centres = [d.mean for _, d in bounded]
            axes.errorbar(
                [at for at, _ in bounded], centres, half, fmt='none', ecolor='#333333', elinewidth=1, capsize=2
            )
    axes.axhline(0, color=STUDENT, linewidth=2)
    axes.spines['bottom'].set_visible(False)
    long_names = len(classes) > 10 or max(map(len, classes)) > 14
    axes.set_xticks(
        range(len(classes)),
        [textwrap.shorten(name, 24, placeholder='…') for name in classes],
        rotation=40 if long_names else 0,
        ha='right' if long_names else 'center',
        rotation_mode='anchor' if long_names else None,
    )
    axes.set_xlim(-0.6, len(classes) - 0.4)
    axes.grid(axis='x', visible=False)
    total = len(comparison.variants[0].per_class)
    which = f' (the {len(classes)} of {total} classes that changed most)' if len(classes) < total else ''
    axes.set_title(f'Gain by class{which}')
    axes.set_ylabel('difference (points)')
    if len(comparison.variants) > 1:
        # On the line of the title, where it covers no bar.
        axes.legend(loc='lower right', bbox_to_anchor=(1, 0.99), ncols=len(comparison.variants), borderaxespad=0.1)


def draw_examples(
    figure: FigureBase,
    examples: Sequence[Mapping],
    class_colours: Mapping[str, Colour] | None = None,
    title: str = 'Examples',
    baseline: str = 'student alone',
) -> None:
    """A grid of images: a row per example, a column per key, in the order of the first example's keys.

    Args:
        figure: figure or sub-figure to draw into.
        examples: dicts such as ``dict(input=..., truth=..., student=..., distilled=..., teacher=...)`` of RGB images
            (H, W, 3) uint8; images of different examples may differ in size. A missing or ``None`` image leaves a gap.
        class_colours: class name -> RGB (0..255), drawn as a legend below the grid.
        title: stands above the grid.
        baseline: what the key ``student`` is called.
    """
    columns = _columns(examples)
    grid, legend = figure, None
    if class_colours:
        height = _examples_height(examples, None)
        grid, legend = figure.subfigures(2, 1, height_ratios=(height, _legend_height(class_colours)))
    axes = grid.subplots(len(examples), len(columns), squeeze=False, height_ratios=[_aspect(e) for e in examples])
    for i, example in enumerate(examples):
        for j, name in enumerate(columns):
            cell = axes[i, j]
            cell.set_axis_off()
            if example.get(name) is not None:
                cell.imshow(np.asarray(example[name]), interpolation='antialiased')
            if i == 0:
                cell.set_title(_example_title(name, baseline), loc='center', color=_title_colour(name, columns))
    if title:
        grid.suptitle(title, x=0.008, ha='left', fontsize=11, fontweight='bold')
    if legend is not None:
        handles = [
            Patch(facecolor=np.asarray(colour, float)[:3] / 255, edgecolor='#555555', linewidth=0.5, label=name)
            for name, colour in class_colours.items()
        ]
        legend.legend(handles=handles, loc='center', ncols=min(len(handles), LEGEND_COLUMNS), handlelength=1.2)


def _draw_heading(figure: SubFigure, comparison: Comparison, heading: str) -> None:
    count = len(comparison.seeds)
    seeds = '1 seed' if count == 1 else f'{count} paired seeds'
    compared = f'Compared with {comparison.words.in_sentences}'
    title = f'{compared}: {comparison.metric}, {comparison.iterations} iterations, {seeds}'
    figure.text(0.008, 0.94, title, fontsize=14, fontweight='bold', va='top')
    height = figure.bbox.height / figure.figure.dpi
    figure.text(0.008, 1 - 0.42 / height, heading, fontsize=10, va='top', linespacing=1.35, color='#333333')


def _styled(comparison: Comparison) -> list[tuple[Row, str, str]]:
    """Each row with its colour and marker, the student first."""
    styled = [(comparison.student, STUDENT, MARKERS[0])]
    for k, row in enumerate(comparison.variants):
        styled.append((row, VARIANTS[k % len(VARIANTS)], MARKERS[1 + k % (len(MARKERS) - 1)]))
    return styled


def _label(row: Row, comparison: Comparison) -> str:
    return comparison.words.baseline if row.difference is None else row.name


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names below the bars: on several lines while that is enough, else slanted."""
    width = min(14, 44 // len(names) - 2)  # characters; 44 fit below a panel
    if any(len(word) > width for name in names for word in name.split()):
        axes.set_xticks(range(len(names)), names, rotation=30, ha='right', rotation_mode='anchor')
    else:
        axes.set_xticks(range(len(names)), [textwrap.fill(name, width) for name in names])


def _spread(count: int) -> np.ndarray:
    """Offsets that keep the points of several seeds from covering each other."""
    return np.linspace(-0.12, 0.12, count) if count > 1 else np.zeros(count)


def _classes_to_show(comparison: Comparison) -> list[str]:
    changes = comparison.variants[0].per_class
    names = list(changes)
    if len(names) <= MOST_CLASSES:
        return names
    most = sorted(names, key=lambda name: -abs(changes[name].mean))[:CLASSES_SHOWN]
    return sorted(most, key=lambda name: -changes[name].mean)


def _class_height(comparison: Comparison, classes: Sequence[str]) -> float:
    return 3.6 if len(classes) > 10 or max(map(len, classes)) > 14 else 2.9


def _columns(examples: Sequence[Mapping]) -> list[str]:
    return [name for name in examples[0] if any(example.get(name) is not None for example in examples)]


def _aspect(example: Mapping) -> float:
    """Height / width of the example's images (the highest one), bounded so that no row takes the page."""
    ratios = [np.shape(image)[0] / np.shape(image)[1] for image in example.values() if image is not None]
    return float(np.clip(max(ratios), 0.2, 1.5))


def _examples_height(examples: Sequence[Mapping], class_colours: Mapping | None) -> float:
    cell = WIDTH / len(_columns(examples))
    height = 0.75 + sum(cell * _aspect(example) for example in examples)
    return height + (_legend_height(class_colours) if class_colours else 0)


def _legend_height(class_colours: Mapping) -> float:
    return 0.2 + 0.25 * -(-len(class_colours) // LEGEND_COLUMNS)


def _example_title(name: str, baseline: str) -> str:
    return {'truth': 'ground truth', 'student': baseline}.get(name, name)


def _title_colour(name: str, columns: Sequence[str]) -> str:
    """Titles have the colours of the curves; input and truth, which no model made, are black."""
    if name == 'student':
        return STUDENT
    if name == 'teacher':
        return TEACHER
    variants = [c for c in columns if c not in ('input', 'truth', 'student', 'teacher')]
    return VARIANTS[variants.index(name) % len(VARIANTS)] if name in variants else 'black'
