"""The frontier of a search as a picture: one panel a measure, against cache bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

MARKERS = "osD^vP*X<>"
OTHER, LINE = "#9a9a9a", "#00224e"


def frontier_picture(report: Mapping[str, Any]) -> bytes:
    """Return a PNG: every layout, one marker a method, and a line along the frontier of each panel."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("loss", "lower"), *((metric, "higher") for metric in report["metrics"])]
    figure = Figure(figsize=(1.6 + 4.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(family(m) for p in report["points"] for m in p["methods"]))
    colours = {
        name: mpl.colormaps["cividis"](0.95 * k / max(len(names) - 1, 1))
        for k, name in enumerate(names)
    }
    for axes, (key, better) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _panel(axes, report["points"], key, better, colours)
        axes.set_xlabel(f"cache at {report['context']:,} tokens (MiB)", fontsize=9)
        axes.set_title(f"{key} ({better} is better)", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside right center", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def family(method: str) -> str:
    """Return the name of a method without its number of layers."""
    return method.rstrip("0123456789 ")


def _panel(axes: Any, points: list[Any], key: str, better: str, colours: dict[str, Any]) -> None:
    for number, (name, colour) in enumerate(colours.items()):
        own = [p for p in points if any(family(m) == name for m in p["methods"])]
        axes.plot(
            [p["cache_bytes"] / 2**20 for p in own],
            [p[key] for p in own],
            MARKERS[number % len(MARKERS)],
            color=colour,
            markeredgecolor="black",
            label=name,
        )
    # the best value of at most so many bytes
    best, line = None, []
    for p in sorted((p for p in points if p["fits"]), key=lambda p: p["cache_bytes"]):
        value = p[key]
        if best is None or (value < best if better == "lower" else value > best):
            best = value
        line.append((p["cache_bytes"] / 2**20, best))
    if line:
        x, y = zip(*line, strict=True)
        axes.step(x, y, where="post", color=LINE, linewidth=1.2, zorder=1, label="best so far")
