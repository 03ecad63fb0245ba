"""Figures over lengths: curves, small multiples, and heat maps of depth and length."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .pictures import CMAP, MARKERS, human_tokens, new_figure


def curves(
    lines: dict[str, list[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    from_zero: bool = True,
) -> Figure:
    """Draw one line with markers per model over lengths (log scale).

    Args:
        lines: model name to (length, value).
        x_label: label of the x axis.
        y_label: label of the y axis.
        title: title of the figure.
        log_y: logarithmic y axis.
        from_zero: start a linear y axis at 0.
    """
    with new_figure(6.4, 3.9) as figure:
        axes = figure.add_subplot()
        cmap = mpl.colormaps[CMAP]
        for number, (name, points) in enumerate(lines.items()):
            shade = 0.9 * number / max(len(lines) - 1, 1)
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                label=name,
                color=cmap(shade),
                marker=MARKERS[number % len(MARKERS)],
                markeredgecolor="black",
                markeredgewidth=0.6,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({length for points in lines.values() for length, _ in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
        axes.minorticks_off()
        if log_y:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left")
        # outside the axes, so that it covers no line
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
        return figure


Line = Sequence[tuple[float, float, float, float]]  # length, value, low, high


def panels(plots: Mapping[str, Mapping[str, Line]], *, title: str, columns: int = 3) -> Figure:
    """Draw score against length, one panel per task, one line with its 95% band per model.

    Args:
        plots: task to model to (length, score, low, high).
        title: title of the figure.
        columns: panels per row.
    """
    names = list(dict.fromkeys(name for lines in plots.values() for name in lines))
    columns = min(columns, len(plots))
    rows = math.ceil(len(plots) / columns)
    colours = {
        name: mpl.colormaps[CMAP](0.92 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)
    }
    with new_figure(max(4.6, 2.9 * columns), 2.3 * rows + 0.9) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes, (task, lines) in zip(grid.flat, plots.items(), strict=False):
            for name, line in lines.items():
                x, y, low, high = zip(*line, strict=True)
                marker = MARKERS[names.index(name) % len(MARKERS)]
                style = {"color": colours[name], "marker": marker, "markersize": 5}
                axes.plot(x, y, label=name, markeredgecolor="black", markeredgewidth=0.5, **style)
                axes.fill_between(x, low, high, color=colours[name], alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({point[0] for line in lines.values() for point in line}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_tokens(value)))
            axes.minorticks_off()
            axes.set_ylim(-0.04, 1.06)
            axes.set_title(task)
            axes.set_xlabel("length (tokens)", fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy", fontsize=9)
        for axes in list(grid.flat)[len(plots) :]:
            axes.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", frameon=False,
            fontsize=9, ncols=min(4, len(handles)),
        )  # fmt: skip
        return figure


def heat_maps(grids: dict[str, list[dict[str, Any]]], *, title: str, columns: int = 3) -> Figure:
    """Draw accuracy by depth and length, one panel per model with a common colour scale.

    Args:
        grids: model name to cells with "length", "depth", "accuracy".
        title: title of the figure.
        columns: panels per row.
    """
    cells = [cell for grid in grids.values() for cell in grid]
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    columns = min(columns, len(grids))
    lines = math.ceil(len(grids) / columns)
    width = max(1.7, 0.62 * len(lengths) + 0.5)
    height = max(1.5, 0.42 * len(depths) + 0.75)
    with new_figure(width * columns + 1.3, height * lines + 0.6) as figure:
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
    image = axes.imshow(table, cmap=CMAP, vmin=0, vmax=1, aspect="auto")
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
