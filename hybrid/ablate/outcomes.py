"""Results of an ablation's predictions and sweeps, and the points of its figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.ablate.config import Ablation, predictions
from hybrid.ablate.design import Design, Variant
from hybrid.ablate.expect import Outcome, Prediction, judge
from hybrid.ablate.grid import cells, short
from hybrid.ablate.metrics import Metric, parse_metric
from hybrid.ablate.runs import Measured

COSTS = ("parameters", "state_bytes", "cache_bytes")


def outcomes(design: Design, measured: Sequence[Measured]) -> list[Outcome]:
    """Return the result of every prediction in every cell of the grid to which it applies."""
    found = {(run.variant, run.seed): run for run in measured if run.diverged is None}
    names = {(v.base_name, v.cell.name): v.name for v in design.variants}
    result = []
    for prediction in predictions(design.ablation):
        told = set()
        for cell in cells(design.ablation.grid):
            labels = {short(axis): label for axis, label in cell.labels}
            free = tuple((a, v) for a, v in labels.items() if a not in prediction.fixed)
            within = all(labels[axis] == label for axis, label in prediction.cell)
            # if both sides name their cell, evaluate the prediction once for that axis
            if within and free not in told:
                told.add(free)
                result.append(_outcome(design.ablation, prediction, labels, free, names, found))
    return result


def _outcome(
    ablation: Ablation,
    prediction: Prediction,
    labels: dict[str, str],
    free: tuple[tuple[str, str], ...],
    names: dict[tuple[str, str], str],
    found: dict[tuple[str, int], Measured],
) -> Outcome:
    def variant(name: str, own: tuple[tuple[str, str], ...]) -> str:
        there = {**labels, **dict(own)}
        return names[name, ",".join(f"{axis}={label}" for axis, label in there.items())]

    sides = [variant(prediction.left, prediction.left_cell)]
    if isinstance(prediction.right, str):
        sides.append(variant(prediction.right, prediction.right_cell))
    seeds = [s for s in ablation.seeds if all((side, s) in found for side in sides)]
    metric = prediction.metric.name
    scores = [[found[side, seed].score(metric) for seed in seeds] for side in sides]
    shown = ",".join(f"{axis}={label}" for axis, label in free)
    return judge(prediction, scores[0], scores[-1], ablation.confidence, shown)


def sweeps(design: Design, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return, for each variant of a sweep, the score of each value with the first seed, and the
    best value.
    """
    sweep = design.ablation.sweep
    if sweep is None:
        return []
    first = design.ablation.seeds[0]
    found = []
    for variant in design.variants:
        runs = [run for run in measured if run.variant == variant.name and run.seed == first]
        scores = {str(run.value): run.metrics.get(sweep.by) for run in runs}
        chosen = next((run.value for run in runs if run.kept), None)
        order = [str(value) for value in sweep.values]
        found.append(
            {
                "variant": variant.name,
                "key": sweep.key,
                "by": sweep.by,
                "scores": {value: scores.get(value) for value in order},
                "chosen": chosen,
            }
        )
    return found


def figure_points(report: dict[str, Any], design: Design) -> dict[str, list[dict[str, float]]]:
    """Return line -> points (x, mean, low, high) of the ablation's figure."""
    options = design.ablation.figure
    if options is None:
        return {}
    metric = parse_metric(options.y)
    records = {record["name"]: record for record in report["variants"]}
    lines: dict[str, list[dict[str, float]]] = {}
    for variant in design.variants:
        for x, name in _places(variant, metric, options.x, design.ablation.metrics):
            found = records[variant.name]["metrics"].get(name)
            if found is None or found["mean"] is None:
                continue
            ends = [
                found[key] if found[key] is not None else found["mean"] for key in ("low", "high")
            ]
            point = {"x": x, "mean": found["mean"], "low": ends[0], "high": ends[1]}
            lines.setdefault(_line(variant, options.x), []).append(point)
    return {line: sorted(points, key=lambda point: point["x"]) for line, points in lines.items()}


def _places(
    variant: Variant, metric: Metric, x: str, metrics: Sequence[str]
) -> list[tuple[float, str]]:
    """Return the position of a variant on the axis, and its metric there."""
    if x in COSTS:
        return [] if variant.cost is None else [(float(getattr(variant.cost, x)), metric.name)]
    for axis, label in variant.cell.labels:
        if x in (axis, short(axis)):
            return [(_number(label), metric.name)]
    found = []
    for name in metrics:
        other = parse_metric(name)
        rest = {key: value for key, value in other.cell if key != x}
        same = (other.task, other.without) == (metric.task, metric.without)
        if same and x in dict(other.cell) and rest == dict(metric.cell):
            found.append((dict(other.cell)[x], name))
    return found


def _line(variant: Variant, x: str) -> str:
    """Return the line of a variant: its changes, and the axes that the figure does not show.

    Against a cost, a line joins all cells of the grid.
    """
    if x in COSTS:
        return variant.base_name
    others = [
        f"{short(axis)}={label}"
        for axis, label in variant.cell.labels
        if x not in (axis, short(axis))
    ]
    return ", ".join([variant.base_name, *others])


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError as error:
        raise ValueError(
            f"figure.x: expected labels of the grid that are numbers, got {label!r}"
        ) from error
