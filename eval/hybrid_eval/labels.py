"""Labels beside points, placed so that they cover neither each other nor a point."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# where a label may stand, best first: (x, y) direction from the point
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_FURTHER = (1.0, 1.8, 2.8, 4.0, 5.5)
_ALIGN = {1: "left", 0: "center", -1: "right"}
_VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    """Return the area in square pixels that a box shares with others."""
    area = 0.0
    for other in others:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        if width > 0 and height > 0:
            area += width * height
    return area


def _outside(box: Bbox, frame: Bbox) -> float:
    """Return the area of a box that lies outside the axes."""
    inside = _overlap(box, [frame])
    return box.width * box.height - inside


def place_labels(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    words: Sequence[str],
    radii: Sequence[float],
    blocked: Sequence[tuple[float, float, float, float]] = (),
) -> list[Annotation]:
    """Annotate points. Call it last: it needs the final limits of the axes.

    Args:
        axes: where.
        x: data coordinates of the points.
        y: the same.
        words: one label per point.
        radii: marker radius of each point, in points (1/72 inch).
        blocked: segments (x0, y0, x1, y1) in data coordinates that labels should not cover.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = figure.dpi / 72
    centres = axes.transData.transform(list(zip(x, y, strict=True)))
    taken = [
        Bbox.from_bounds(cx - r * pixel, cy - r * pixel, 2 * r * pixel, 2 * r * pixel)
        for (cx, cy), r in zip(centres, radii, strict=True)
    ]
    for x0, y0, x1, y1 in blocked:
        (ax, ay), (bx, by) = axes.transData.transform([(x0, y0), (x1, y1)])
        taken.append(Bbox([[min(ax, bx) - 1, min(ay, by) - 1], [max(ax, bx) + 1, max(ay, by) + 1]]))
    frame = axes.get_window_extent(renderer)
    placed = []
    for px, py, label, radius in zip(x, y, words, radii, strict=True):
        best, best_cost = None, float("inf")
        for step in _FURTHER:
            for dx, dy in _DIRECTIONS:
                # on the diagonal the edge of the marker is nearer
                reach = (radius + 3) * step * (0.75 if dx and dy else 1.0)
                note = axes.annotate(
                    label,
                    (px, py),
                    xytext=(dx * reach, dy * reach),
                    textcoords="offset points",
                    ha=_ALIGN[dx],
                    va=_VERTICAL[dy],
                    fontsize=9,
                )
                box = note.get_window_extent(renderer)
                cost = _overlap(box, taken) + 4 * _outside(box, frame) + 5 * (step - 1)
                if cost < best_cost:
                    if best is not None:
                        best.remove()
                    best, best_cost = note, cost
                else:
                    note.remove()
            if best_cost < 1:
                break
        assert best is not None
        taken.append(best.get_window_extent(renderer))
        placed.append(best)
    return placed
