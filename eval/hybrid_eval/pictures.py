"""Figures of the report, drawn by matplotlib without a display.

The colour map is cividis, which is suitable for colour-blind readers and for greyscale.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .labels import place_labels

_STYLE: dict[Any, Any] = {
    # print names literally: a dollar sign does not start a formula
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "savefig.dpi": 200,
    "figure.dpi": 100,
}
CMAP = "cividis"
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """One model in a scatter plot. ``x`` and ``y`` are (value, low, high)."""

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    cache_bytes: float | None = None


def human_bytes(value: float) -> str:
    """Format bytes: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def human_tokens(value: float) -> str:
    """Format a number of tokens: 32768 -> '32k'."""
    value = int(value)
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024}k"
    return f"{value:,}"


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Open a figure of this size in inches, in the style of the report."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=_STYLE["savefig.dpi"])
    return buffer.getvalue()


def to_vectors(figure: Figure, kind: str) -> bytes:
    """Return a figure as "svg" or "pdf": the same bytes for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "hybrid_eval", "svg.fonttype": "none"}):
        dated = {"Date": None} if kind == "svg" else {"CreationDate": None}
        figure.savefig(buffer, format=kind, metadata=dated)
    return buffer.getvalue()


def _error_bars(axes, point: Point, colour) -> list[tuple[float, float, float, float]]:
    (x, x0, x1), (y, y0, y1) = point.x, point.y
    axes.errorbar(
        [x],
        [y],
        xerr=[[max(0, x - x0)], [max(0, x1 - x)]],
        yerr=[[max(0, y - y0)], [max(0, y1 - y)]],
        fmt="none",
        ecolor=colour,
        elinewidth=1.2,
        capsize=3,
        zorder=2,
    )
    return [(x0, y, x1, y), (x, y0, x, y1)]


def _area(cache_bytes: float | None, largest: float) -> float:
    """Marker area in square points, proportional to the cache above a visible minimum."""
    if not cache_bytes or not largest:
        return 60.0
    return 40.0 + 360.0 * cache_bytes / largest


def _log_norm(values: Sequence[float]) -> Normalize:
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    return LogNorm(low, high)


def _pad_x(axes, points: Sequence[Point], *, log: bool) -> None:
    """Add space left and right for labels."""
    low, high = min(p.x[1] for p in points), max(p.x[2] for p in points)
    if log:
        ratio = max(high / low, 4.0) ** 0.25
        axes.set_xlim(low / ratio, high * ratio)
        return
    span = max(high - low, 1e-3 * max(abs(high), 1.0))
    axes.set_xlim(low - 0.28 * span, high + 0.28 * span)


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    title: str,
    chance: float | None = None,
    context: int | None = None,
    log_x: bool = False,
    y_limits: tuple[float, float] = (-0.04, 1.08),
    x_limits: tuple[float, float] | None = None,
    frontier: bool = False,
) -> Figure:
    """Draw one labelled point per model, with 95% intervals.

    Marker area and colour show the cache bytes, if known.

    Args:
        points: models.
        x_label: label of the x axis.
        y_label: label of the y axis.
        title: title of the figure.
        chance: horizontal line at the chance level.
        context: number of tokens of the cache bytes, for the label of the colour bar.
        log_x: logarithmic x axis.
        y_limits: limits of the y axis.
        x_limits: limits of the x axis; None for automatic.
        frontier: draw the Pareto frontier of smaller x and larger y.
    """
    sizes = [p.cache_bytes for p in points if p.cache_bytes]
    with new_figure(6.4, 4.3) as figure:
        axes = figure.add_subplot()
        coloured = len(sizes) == len(points) and not log_x
        norm = _log_norm(sizes) if coloured else None
        cmap = mpl.colormaps[CMAP]
        blocked, radii = [], []
        for number, point in enumerate(points):
            shade = norm(point.cache_bytes or 0) if norm is not None else 0.25
            area = _area(point.cache_bytes, max(sizes)) if coloured else 70.0
            blocked += _error_bars(axes, point, "#555555")
            axes.scatter(
                [point.x[0]],
                [point.y[0]],
                s=area,
                color=[cmap(shade)],
                marker=MARKERS[number % len(MARKERS)] if not coloured else "o",
                edgecolor="black",
                linewidth=0.8,
                # the smaller marker on top
                zorder=4 - area / 1000,
            )
            radii.append(math.sqrt(area / math.pi))
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
        _pad_x(axes, points, log=log_x)
        axes.set_ylim(*y_limits)
        if x_limits is not None:
            axes.set_xlim(*x_limits)
        if not log_x:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        if frontier:
            blocked += _draw_frontier(axes, points)
        if chance is not None:
            axes.axhline(chance, color="#888888", linestyle="--", linewidth=1, zorder=1)
            axes.annotate(
                "chance",
                (0.995, chance),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                color="#666666",
                fontsize=8,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left")
        if norm is not None:
            bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, pad=0.02, fraction=0.05)
            words = "" if context is None else f" at {human_tokens(context)} tokens"
            bar.set_label(f"cache per sequence{words} (also marker area)")
            bar.ax.minorticks_off()
            ticks = sorted(set(sizes))
            bar.set_ticks(_apart(ticks, norm))
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
            bar.outline.set_visible(False)  # type: ignore[operator]
        place_labels(
            axes, [p.x[0] for p in points], [p.y[0] for p in points],
            [p.label for p in points], radii, blocked,
        )  # fmt: skip
        return figure


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points on the Pareto frontier of small x and large y, by ascending x."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x[0], -p.y[0])):
        if not found or point.y[0] > found[-1].y[0]:
            found.append(point)
    return found


def _draw_frontier(axes, points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """Draw the frontier as steps up to the right edge, and return its segments."""
    best = on_frontier(points)
    x = [*(p.x[0] for p in best), axes.get_xlim()[1]]
    y = [*(p.y[0] for p in best), best[-1].y[0]]
    axes.step(x, y, where="post", color="#b8860b", linewidth=1.4, alpha=0.8, zorder=1)
    return [(x[i], y[i], x[i + 1], y[i]) for i in range(len(best))]


def _apart(values: Sequence[float], norm: Normalize, gap: float = 0.06) -> list[float]:
    """Remove ticks that overlap on the colour bar."""
    kept: list[float] = []
    for value in values:
        if not kept or norm(value) - norm(kept[-1]) >= gap:
            kept.append(value)
    return kept
