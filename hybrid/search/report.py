"""The report of a search: ``report.json``, ``report.md``, ``layouts.csv`` and ``frontier.png``."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrid.files import write_bytes, write_json, write_text
from hybrid.plan import human_bytes
from hybrid.search.frontier import on_frontier
from hybrid.search.picture import frontier_picture

JSON, MARKDOWN, TABLE, PICTURE = "report.json", "report.md", "layouts.csv", "frontier.png"

Record = dict[str, Any]

Table = tuple[str, str, list[str], list[list[str]]]
"""Title, text, headings and rows."""


def measures(metrics: Sequence[str]) -> dict[str, str]:
    """Return key of a point -> direction, of what the frontier is taken over."""
    return {"cache_bytes": "lower", "loss": "lower", **dict.fromkeys(metrics, "higher")}


def finish(report: Record, out: Path) -> Record:
    """Mark the points on the frontier, sort all points, and write the report's files.

    Args:
        report: with ``name``, ``about``, ``budget``, ``metrics``, ``context`` and ``points``. A point
            has ``layout``, ``softmax_layers``, ``cache_bytes``, ``loss``, ``methods``, ``command``, a
            value for each metric, and ``fits``, whether it is within the budget.
        out: the folder.
    """
    points: list[Record] = report["points"]
    chosen = [p for p in points if p["fits"]]
    best = on_frontier(chosen, measures(report["metrics"]))
    for point in points:
        point["frontier"] = any(point is other for other in best)
    points.sort(key=lambda p: (-p["cache_bytes"], p["loss"]))
    report["versions"] = {
        name: metadata.version(name)
        for name in ("hybrid-language-models", "torch", "transformers", "optuna")
    }
    write_json(out / JSON, report, allow_nan=False)
    write_text(out / TABLE, table(report))
    write_bytes(out / PICTURE, frontier_picture(report))
    write_text(out / MARKDOWN, markdown(report))
    return report


def table(report: Mapping[str, Any]) -> str:
    """Return all points as CSV."""
    buffer = io.StringIO()
    keys = ["layout", "softmax_layers", "cache_bytes", "loss", "kl", "kl_error", *report["metrics"]]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*keys, "frontier", "within_budget", "methods", "command"])
    for point in report["points"]:
        row = ["" if point.get(key) is None else point[key] for key in keys]
        flags = [point["frontier"], point["fits"]]
        writer.writerow([*row, *flags, "; ".join(point["methods"]), shown(point)])
    return buffer.getvalue()


def shown(point: Mapping[str, Any]) -> str:
    """Return the command of a point as a line for a shell; empty for none."""
    return shlex.join(point["command"] or [])


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    parts = [f"# Search: {report['name']}", report["about"], f"Budget: {report['budget']}."]
    chosen = [p for p in report["points"] if p["frontier"]]
    parts += ["## Frontier", "No other layout within the budget is at least as good in all of"]
    parts[-1] += f" {', '.join(measures(report['metrics']))}, and better in one."
    parts.append(_rows(report, chosen))
    parts.append("\n".join(["```console", *(f"$ {shown(p)}" for p in chosen), "```"]))
    parts += ["![Frontier](frontier.png)", "## All layouts", _rows(report, report["points"])]
    for title, words, heads, rows in report["tables"]:
        parts += [f"## {title}", words, _table(heads, rows)]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts.append(f"{report['footer']} Versions: {versions}.")
    return "\n\n".join(parts) + "\n"


def _rows(report: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    has_kl = any("kl" in point for point in points)
    heads = ["layout", "softmax layers", f"cache at {report['context']:,}", "loss"]
    heads += [*(["KL"] if has_kl else []), *report["metrics"], "proposed by"]
    rows = []
    for p in points:
        row = [f"`{p['layout']}`", str(p["softmax_layers"]), human_bytes(p["cache_bytes"])]
        row.append(f"{p['loss']:.4f}")
        if has_kl:
            row.append(with_error(p["kl"], p["kl_error"]))
        row += [f"{p[metric]:.3f}" for metric in report["metrics"]]
        rows.append([*row, ", ".join(p["methods"])])
    return _table(heads, rows)


def with_error(value: float, error: float | None) -> str:
    """Return ``value +- error``."""
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
