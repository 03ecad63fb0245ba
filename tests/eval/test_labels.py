import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hybrid_eval.labels import place_labels

mpl.use("Agg")


def boxes(points, words, radius=6.0, blocked=()):
    """Boxes of the labels, the markers' centres in pixels, their radius, and the axes' box."""
    figure = Figure(figsize=(6.4, 4.3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    x, y = zip(*points, strict=True)
    labels = place_labels(axes, x, y, words, [radius] * len(points), blocked)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = [label.get_window_extent(renderer) for label in labels]
    assert [label.get_text() for label in labels] == list(words)
    pixels = axes.transData.transform(points)
    return found, pixels, radius * figure.dpi / 72, axes.get_window_extent(renderer), axes


LAYOUTS = {
    "apart": [(0.2, 0.3), (0.5, 0.5), (0.8, 0.7)],
    "near": [(0.50, 0.5), (0.52, 0.5), (0.5, 0.53)],
    "corners": [(0.02, 0.98), (0.98, 0.98), (0.98, 0.02)],
    "same": [(0.5, 0.5), (0.5, 0.5)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_cover_neither_each_other_nor_a_marker_nor_leave_the_axes(name):
    points = LAYOUTS[name]
    words = ["LLLS", "SSSS with words", "LLLL"][: len(points)]
    found, pixels, radius, frame, _ = boxes(points, words)
    for number, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:number])
        for cx, cy in pixels:
            nearest = (min(max(cx, box.x0), box.x1), min(max(cy, box.y0), box.y1))
            assert (nearest[0] - cx) ** 2 + (nearest[1] - cy) ** 2 >= (0.9 * radius) ** 2
        assert frame.x0 - 1 <= box.x0
        assert box.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= box.y0
        assert box.y1 <= frame.y1 + 1


def test_labels_keep_off_error_bars():
    (box,), *_, axes = boxes([(0.5, 0.5)], ["a label"], blocked=[(0.3, 0.5, 0.7, 0.5)])
    height = axes.transData.transform((0.5, 0.5))[1]
    assert not box.y0 < height < box.y1


def test_the_same_points_have_the_same_labels():
    first, second = (boxes(LAYOUTS["near"], ["a", "b", "c"])[0] for _ in range(2))
    assert [b.bounds for b in first] == [b.bounds for b in second]
