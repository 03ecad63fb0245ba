"""The effects of an ablation as a picture: one row a comparison, one panel a metric."""

from __future__ import annotations

import io
from typing import Any

ESTABLISHED, NOISE = "#00224e", "#9a9a9a"


def forest(report: dict[str, Any]) -> bytes:
    """A PNG: differences with their intervals; what is established is dark, noise is grey."""
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
    panels[0].invert_yaxis()  # once: the panels share it
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
