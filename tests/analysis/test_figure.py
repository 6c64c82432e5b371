import matplotlib.colors
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from kd_dense.analysis import figure
from kd_dense.analysis.compare import compare
from kd_dense.analysis.figure import (
    draw_classes,
    draw_curves,
    draw_differences,
    draw_examples,
    draw_scores,
    save_figure,
)


def share(image: np.ndarray, colour) -> float:
    """Share of the pixels that have about this colour."""
    rgb = np.asarray(matplotlib.colors.to_rgb(colour))
    return float((np.abs(image[..., :3] - rgb).max(-1) < 0.02).mean())


def axes_of(draw, *arguments):
    drawing = Figure()
    axes = drawing.subplots()
    draw(axes, *arguments)
    return axes


@pytest.fixture
def examples() -> list[dict]:
    """Two images of different shape, every column in a plain colour of its own."""
    colours = dict(
        input=(10, 200, 30), truth=(200, 10, 30), student=(30, 10, 200), distilled=(200, 10, 200), teacher=None
    )
    return [
        {k: None if c is None else np.full((*size, 3), c, np.uint8) for k, c in colours.items()}
        for size in ((60, 120), (90, 60))
    ]


def test_picture_is_drawn_with_every_part(runs, examples, tmp_path):
    colours = {'road': (120, 60, 200), 'pole': (1, 120, 250)}
    comparison = compare({'student': runs['student'], 'distilled': runs['LogitKD']}, 70.0)
    path = save_figure(comparison, tmp_path / 'new' / 'comparison.png', examples, colours)
    image = imread(path)
    assert image.shape[1] == 2100
    assert image[..., :3].std() > 0.1  # not blank
    for example_colour in ((10, 200, 30), (200, 10, 30), (30, 10, 200), (200, 10, 200)):
        assert share(image, np.divide(example_colour, 255)) > 0.01
    for legend_colour in colours.values():
        assert share(image, np.divide(legend_colour, 255)) > 1e-5
    for mark in (figure.STUDENT, figure.VARIANTS[0], figure.TEACHER):
        assert share(image, mark) > 1e-4


def test_the_picture_of_an_adaptation_names_its_baseline(adapted, examples, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: drawn.append(self))
    save_figure(compare(adapted, 70.0), tmp_path / 'x.png', examples)
    FigureCanvasAgg(drawn[0]).draw()
    texts = [' '.join(text.get_text().split()) for text in visible_texts(drawn[0])]
    assert 'Compared with source only: mIoU, 800 iterations, 5 paired seeds' in texts
    # the legend of the curves, the bars, and above the examples
    assert [texts.count(name) for name in ('source only', 'adapted', 'target oracle')] == [3, 3, 2]
    assert not any('student' in text or 'teacher' in text for text in texts)


def test_picture_without_examples_is_shorter(runs, examples, tmp_path):
    comparison = compare({'student': runs['student'], 'distilled': runs['LogitKD']}, None)
    short = imread(save_figure(comparison, tmp_path / 'short.png'))
    tall = imread(save_figure(comparison, tmp_path / 'tall.png', examples))
    assert short.shape[0] < tall.shape[0]
    assert short[..., :3].std() > 0.05


@pytest.mark.parametrize('seeds', [1, 5])
def test_no_text_covers_another_or_leaves_the_picture(runs, examples, seeds, monkeypatch, tmp_path):
    """With the longest content: several variants, long class names, a legend."""
    names = ('student', 'LogitKD', 'CWD', 'FeatureMimic', 'a variant with a long name')
    chosen = {
        n: (runs['student'] if n == 'student' else runs['LogitKD' if i % 2 else 'CWD'])[:seeds]
        for i, n in enumerate(names)
    }
    for records in chosen.values():
        for r in records:
            r.per_class = {f'a long class name {i}': r.value + i % 3 for i in range(20)}
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: drawn.append(self))
    save_figure(compare(chosen, 70.0), tmp_path / 'x.png', examples, {f'class {i}': (i, i, i) for i in range(19)})
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    texts = visible_texts(drawn[0])
    assert len(texts) > 40
    width, height = canvas.get_width_height()
    boxes = np.array([t.get_window_extent().extents for t in texts])
    outside = (boxes[:, :2].min(1) < 0) | (boxes[:, 2] > width) | (boxes[:, 3] > height)
    assert [texts[i].get_text() for i in np.flatnonzero(outside)] == []
    # The box around a slanted text is mostly empty, so that boxes may meet where texts do not.
    upright = [i for i, t in enumerate(texts) if t.get_rotation() in (0, 90)]
    boxes = boxes[upright]
    overlap = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    pairs = np.argwhere(np.triu((overlap > 1).all(-1), 1))
    assert [(texts[upright[a]].get_text(), texts[upright[b]].get_text()) for a, b in pairs] == []


def visible_texts(drawing: Figure) -> list:
    """Every text that is drawn; an axis also keeps labels of ticks outside its limits, which are not."""
    hidden = set()
    for axes in drawing.findobj(Axes):
        if not axes.axison:
            hidden.update(axes.xaxis.findobj(Text) + axes.yaxis.findobj(Text))
            continue
        view = axes.get_window_extent()
        for tick in axes.xaxis.get_major_ticks():
            if not view.x0 - 1 <= axes.transData.transform((tick.get_loc(), 0))[0] <= view.x1 + 1:
                hidden.add(tick.label1)
        for tick in axes.yaxis.get_major_ticks():
            if not view.y0 - 1 <= axes.transData.transform((0, tick.get_loc()))[1] <= view.y1 + 1:
                hidden.add(tick.label1)
    return [t for t in drawing.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]


def test_curves_show_mean_and_range_where_all_seeds_were_validated(runs):
    runs['student'][0].curve = [(200, 1.0), (400, 50.0), (800, 60.0)]
    axes = axes_of(draw_curves, compare({'student': runs['student'], 'distilled': runs['LogitKD']}, 70.0))
    student, distilled, teacher = axes.get_lines()
    assert list(student.get_xdata()) == [400, 800]
    assert list(student.get_ydata()) == pytest.approx([50.0, 60.0])
    assert list(distilled.get_ydata()) == pytest.approx([52.0, 62.0])
    assert list(teacher.get_ydata()) == [70.0, 70.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(49.0), pytest.approx(61.0))


def test_curves_without_validation_say_so(runs):
    for records in runs.values():
        for r in records:
            r.curve = []
    axes = axes_of(draw_curves, compare(runs))
    assert [t.get_text() for t in axes.texts] == ['no validation during training']


def test_bars_start_at_zero_and_have_the_means_as_height(runs):
    axes = axes_of(draw_scores, compare(runs, 70.0))
    assert axes.get_ylim()[0] == 0
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([60.0, 62.0, 60.1, 70.0])
    assert [t.get_text() for t in axes.texts] == ['60.00', '62.00', '60.10', '70.00']
    assert [len(line.get_ydata()) for line in axes.get_lines()] == [
        5,
        5,
        5,
        0,
    ]  # a point per seed, none for the teacher


def test_differences_show_seeds_mean_interval_and_zero(runs):
    axes = axes_of(draw_differences, compare(runs, 70.0))
    (low, high), *_ = (c.get_segments()[0][:, 1] for c in axes.collections)
    assert (low, high) == (pytest.approx(1.018379, abs=1e-5), pytest.approx(2.981621, abs=1e-5))
    assert axes.get_ylim()[0] < 0 < axes.get_ylim()[1]
    assert [t.get_text() for t in axes.texts] == ['+2.00', '+0.10']


def test_class_bars_are_the_differences(runs):
    axes = axes_of(draw_classes, compare(runs, 70.0), ['road', 'pole'])
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2.0, 2.0, 0.1, 0.1])
    assert [t.get_text() for t in axes.get_xticklabels()] == ['road', 'pole']


def test_examples_are_a_grid_with_the_columns_that_have_images(examples):
    drawing = Figure()
    draw_examples(drawing, examples)
    titles = [axes.get_title() for axes in drawing.axes if axes.get_title()]
    assert titles == ['input', 'ground truth', 'student alone', 'distilled']  # no teacher was drawn
    assert len(drawing.axes) == 8
    assert all(len(axes.images) == 1 for axes in drawing.axes)
