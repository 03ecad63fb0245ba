"""Figures of an ablation: effects with one row per comparison and one panel per metric."""

from __future__ import annotations

import io
from typing import Any

ESTABLISHED, NOISE = "#00224e", "#9a9a9a"


def forest(report: dict[str, Any]) -> bytes:
    """Return a PNG of the differences with intervals; established ones are dark, noise is grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(report["metrics"])
    rows = max(1, len(report["effects"]) // max(1, len(metrics)))
    figure = Figure(figsize=(2.2 + 3.4 * len(metrics), 1.6 + 0.34 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _panel(axes, [e for e in report["effects"] if e["metric"] == metric])
        better = report["metrics"][metric]
        axes.set_title(f"{metric} ({better} is better)", fontsize=10)
        axes.set_xlabel(f"difference, {report['confidence']:.0%} interval", fontsize=9)
    panels[0].invert_yaxis()  # once, since the panels share the axis
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _panel(axes: Any, effects: list[dict[str, Any]]) -> None:
    axes.axvline(0, color="#444444", linewidth=0.8)
    for row, effect in enumerate(effects):
        if effect["mean"] is None:
            continue
        colour = ESTABLISHED if effect["verdict"] in ("better", "worse") else NOISE
        axes.plot(effect["mean"], row, "o", color=colour, markersize=5)
        if effect["low"] is not None:
            axes.plot([effect["low"], effect["high"]], [row, row], color=colour, linewidth=1.8)
    names = [f"{e['change']} ({e['kind']})" for e in effects]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def curve(report: dict[str, Any]) -> bytes:
    """Return a PNG of a metric against an axis, with one line per variant and intervals."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    asked = report["figure"]
    lines = asked["lines"]
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs = sorted({point["x"] for points in lines.values() for point in points})
    for number, (name, points) in enumerate(lines.items()):
        colour = mpl.colormaps["cividis"](0.92 * number / max(len(lines) - 1, 1))
        x, y, low, high = ([point[key] for point in points] for key in ("x", "mean", "low", "high"))
        marker = "osD^vP*X<>"[number % 10]
        style = {"color": colour, "marker": marker, "markeredgecolor": "black"}
        below = [max(0.0, value - end) for value, end in zip(y, low, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(y, high, strict=True)]
        joined = "-" if len(points) > 1 else "none"
        axes.errorbar(x, y, yerr=[below, above], label=name, linestyle=joined, capsize=3, **style)
    if len(xs) > 1 and xs[0] > 0 and xs[-1] / xs[0] >= 4:
        axes.set_xscale("log", base=2)
        if len(xs) <= 8:
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
    axes.set_xlabel(asked["x"])
    axes.set_ylabel(asked["y"])
    axes.set_title(report["name"], loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
