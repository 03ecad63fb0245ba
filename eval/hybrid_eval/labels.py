"""Labels of points, placed by adjustText without overlaps."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.text import Text

_STEPS = 500  # iterations instead of a time limit, for equal figures on every machine


def place_labels(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    words: Sequence[str],
    radii: Sequence[float],
    blocked: Sequence[tuple[float, float, float, float]] = (),
) -> list[Text]:
    """Label points. Call this last, since it depends on the final limits of the axes.

    Args:
        axes: the axes.
        x: data coordinates of the points.
        y: data coordinates of the points.
        words: one label per point.
        radii: marker radius of each point, in points (1/72 inch).
        blocked: segments (x0, y0, x1, y1) in data coordinates that labels avoid.
    """
    centres = axes.transData.transform(list(zip(x, y, strict=True)))
    pixels = [radius * axes.figure.dpi / 72 for radius in radii]
    avoided = np.array(list(_avoided(axes, centres, pixels, blocked)))
    to_data = axes.transData.inverted()
    avoided = to_data.transform(avoided)
    middle = axes.transAxes.transform((0.5, 0.5))
    labels = []
    for centre, radius, word in zip(centres, pixels, words, strict=True):
        inward = np.where(centre <= middle, 1, -1)  # a label in a corner has space on one side only
        labels.append(
            axes.text(
                *to_data.transform(centre + (radius + 3) * inward),
                word,
                ha="left" if inward[0] > 0 else "right",
                va="bottom" if inward[1] > 0 else "top",
                fontsize=9,
            )
        )
    adjust_text(
        labels,
        x=avoided[:, 0],
        y=avoided[:, 1],
        target_x=list(x),
        target_y=list(y),
        avoid_self=False,
        force_static=(0.3, 0.5),
        max_move=(20, 20),
        ax=axes,
        iter_lim=_STEPS,
        min_arrow_len=12,
        arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6},
    )
    return labels


def _avoided(
    axes: Axes, centres: np.ndarray, radii: Sequence[float], blocked: Sequence[Sequence[float]]
) -> Iterator[np.ndarray]:
    """Yield pixels that labels avoid: centres and edges of markers, and points along segments."""
    for centre, radius in zip(centres, radii, strict=True):
        yield centre
        for angle in np.linspace(0, 2 * math.pi, 12, endpoint=False):
            yield centre + (radius + 2) * np.array([math.cos(angle), math.sin(angle)])
    for x0, y0, x1, y1 in blocked:
        start, end = axes.transData.transform([(x0, y0), (x1, y1)])
        for share in np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 6)):
            yield start + share * (end - start)
