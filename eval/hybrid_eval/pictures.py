"""The pictures of the report, as matplotlib figures drawn without a display.

Colours are cividis throughout: it reads the same with colour-blind eyes and in grey.
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
    # names are printed as they are: a dollar sign begins no formula
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
_CMAP = "cividis"
_MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """One model in a scatter picture. ``x`` and ``y`` are (value, low, high)."""

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    cache_bytes: float | None = None


def human_bytes(value: float) -> str:
    """Return bytes in words: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def human_tokens(value: float) -> str:
    """Return a number of tokens in words: 32768 -> '32k'."""
    value = int(value)
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024}k"
    return f"{value:,}"


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
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
    """Leave room left and right for labels."""
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
) -> Figure:
    """Draw one labelled point per model, with 95% intervals.

    Where the points carry cache bytes, marker area and colour show them.

    Args:
        points: models.
        x_label: of the axis.
        y_label: of the axis.
        title: of the picture.
        chance: horizontal line at the score of a guesser.
        context: tokens at which the cache bytes hold, for the colour bar's label.
        log_x: logarithmic x axis.
        y_limits: of the y axis.
        x_limits: of the x axis; None lets the data decide.
    """
    sizes = [p.cache_bytes for p in points if p.cache_bytes]
    with _figure(6.4, 4.3) as figure:
        axes = figure.add_subplot()
        coloured = len(sizes) == len(points) and not log_x
        norm = _log_norm(sizes) if coloured else None
        cmap = mpl.colormaps[_CMAP]
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
                marker=_MARKERS[number % len(_MARKERS)] if not coloured else "o",
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


def _apart(values: Sequence[float], norm: Normalize, gap: float = 0.06) -> list[float]:
    """Drop ticks that would overlap on the colour bar."""
    kept: list[float] = []
    for value in values:
        if not kept or norm(value) - norm(kept[-1]) >= gap:
            kept.append(value)
    return kept


def curves(
    lines: dict[str, list[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
) -> Figure:
    """Draw one line with markers per model over lengths (log scale).

    Args:
        lines: model name to (length, value).
        x_label: of the axis.
        y_label: of the axis.
        title: of the picture.
        log_y: logarithmic y axis.
    """
    with _figure(6.4, 3.9) as figure:
        axes = figure.add_subplot()
        cmap = mpl.colormaps[_CMAP]
        for number, (name, points) in enumerate(lines.items()):
            shade = 0.9 * number / max(len(lines) - 1, 1)
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                label=name,
                color=cmap(shade),
                marker=_MARKERS[number % len(_MARKERS)],
                markeredgecolor="black",
                markeredgewidth=0.6,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({length for points in lines.values() for length, _ in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
        axes.minorticks_off()
        if log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left")
        # beside the axes: never on a line
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
        return figure


def heat_maps(grids: dict[str, list[dict[str, Any]]], *, title: str, columns: int = 3) -> Figure:
    """Draw accuracy by depth and length, one small picture per model on one colour scale.

    Args:
        grids: model name to cells with "length", "depth", "accuracy".
        title: of the whole.
        columns: small pictures per line.
    """
    cells = [cell for grid in grids.values() for cell in grid]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    columns = min(columns, len(grids))
    lines = math.ceil(len(grids) / columns)
    width = max(1.7, 0.62 * len(lengths) + 0.5)
    height = max(1.5, 0.42 * len(depths) + 0.75)
    with _figure(width * columns + 1.3, height * lines + 0.6) as figure:
        grid_axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        image = None
        for axes, (name, grid) in zip(grid_axes.flat, grids.items(), strict=False):
            image = _heat_map(axes, grid, lengths, depths)
            axes.set_title(name)
        for axes in list(grid_axes.flat)[len(grids) :]:
            axes.set_visible(False)
        figure.supxlabel("length (tokens)", fontsize=10)
        figure.supylabel("depth of the needle", fontsize=10)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        if image is not None:
            bar = figure.colorbar(image, ax=grid_axes, fraction=0.04, pad=0.02)
            bar.set_label("accuracy")
            bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def _heat_map(axes, grid: list[dict[str, Any]], lengths: list[int], depths: list[float]):
    table = [[math.nan] * len(lengths) for _ in depths]
    for cell in grid:
        table[depths.index(cell["depth"])][lengths.index(cell["length"])] = cell["accuracy"]
    image = axes.imshow(table, cmap=_CMAP, vmin=0, vmax=1, aspect="auto")
    for line, row in enumerate(table):
        for column, value in enumerate(row):
            if math.isnan(value):
                continue
            axes.text(
                column,
                line,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 0.55 else "black",
            )
    axes.set_xticks(range(len(lengths)), [human_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image
