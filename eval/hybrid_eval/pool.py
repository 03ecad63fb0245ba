"""Pool several seeds of one layout into one model of a report, with the variance between seeds.

Models called ``NAME seed 0``, ``NAME seed 1`` and so on are seeds of one model if they have the
same layout, size, dtype, tokenizer and knock-out.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from . import seeds
from .seeds import Score

Record = dict[str, Any]

_SEED = re.compile(
    r"^(?P<name>.+?)[ _-]+seed[ _-]?(?P<seed>\d+)(?P<rest> without .+)?$", re.IGNORECASE
)
_SAME = ("layout", "parameters", "dtype", "tokenizer_hash", "ablate", "model_type", "branches")
_CONFIDENCE = 0.95
# figures of a result that are means over its items, and so over seeds
_FIGURES = re.compile(r"accuracy|above_chance|loss|nll|bits_per_byte|perplexity|late|drop|second")


def seed_of(name: str) -> tuple[str, int | None]:
    """Split ``NAME seed 3`` into its name and its seed; a name without a seed has None."""
    found = _SEED.match(name)
    if found is None:
        return name, None
    return found["name"] + (found["rest"] or ""), int(found["seed"])


def score_of(result: Record) -> Score:
    """Return the headline figure of a result, with its items if the figure is their mean."""
    bounded = result["metric"] == "accuracy" or "chance" in result
    return Score(result[result["metric"]], tuple(result.get("items", ())), bounded)


def _interval(scores: Sequence[Score]) -> list[float] | None:
    """Return the interval of a mean over seeds, from seeds and shared items."""
    values = [score.value for score in scores]
    _, low, high, _ = seeds.estimate(values, _CONFIDENCE, seeds.sampling_of(scores))
    return None if math.isnan(low) else [low, high]


def _means(results: Sequence[Record], pattern: re.Pattern[str]) -> Record:
    """Return the mean of every figure that all results have."""
    found = {}
    for key, value in results[0].items():
        values = [v for result in results if isinstance(v := result.get(key), float)]
        if pattern.search(key) and isinstance(value, float) and len(values) == len(results):
            found[key] = math.fsum(values) / len(values)
    return found


def _cells(results: Sequence[Record]) -> list[Record]:
    """Return the cells of a grid with means over seeds and intervals from the seeds alone."""
    cells = []
    for group in zip(*(result["cells"] for result in results), strict=True):
        merged = {**group[0], **_means(group, _FIGURES)}
        scores = [Score(cell["accuracy"], (), True) for cell in group if "accuracy" in cell]
        if scores and "interval" in group[0]:
            own = [cell["interval"] for cell in group]
            # at least as wide as the interval from the items of a cell
            half = math.fsum(high - low for low, high in own) / (2 * len(own))
            low, high = _interval(scores) or (merged["accuracy"],) * 2
            merged["interval"] = [
                max(0.0, min(low, merged["accuracy"] - half)),
                min(1.0, max(high, merged["accuracy"] + half)),
            ]
        cells.append(merged)
    return cells


def _pool_task(results: Sequence[Record]) -> Record:
    """Return one result for the seeds of a task."""
    first = results[0]
    merged: Record = {**first, **_means(results, _FIGURES)}
    scores = [score_of(result) for result in results]
    if "interval" in first:
        merged["interval"] = _interval(scores)
    if "cells" in first and all(len(r.get("cells", ())) == len(first["cells"]) for r in results):
        merged["cells"] = _cells(results)
    buckets = [result.get("positions") or [] for result in results]
    if buckets[0] and len({len(own) for own in buckets}) == 1:
        groups = zip(*buckets, strict=True)
        merged["positions"] = [{**group[0], **_means(group, _FIGURES)} for group in groups]
    if len({len(score.items) for score in scores}) == 1 and scores[0].items:
        items = zip(*(score.items for score in scores), strict=True)
        merged["items"] = [math.fsum(values) / len(scores) for values in items]
    return merged


def _pool(name: str, records: Sequence[Record], numbers: Sequence[int]) -> Record:
    common = [
        task
        for task in records[0]["results"]
        if all(task in record["results"] for record in records)
    ]
    return {
        **records[0],
        "name": name,
        "seeds": list(numbers),
        "replicas": list(records),
        "results": {
            task: _pool_task([record["results"][task] for record in records]) for task in common
        },
    }


def pooled(results: Record) -> Record:
    """Return results in which the seeds of one model are pooled.

    A pooled model has "seeds" and "replicas" (the records of the seeds), the mean of every figure,
    and an interval that accounts for the variance of seeds and of items.
    """
    groups: dict[str, list[tuple[int | None, Record]]] = {}
    taken = {record["name"] for record in results["models"]}
    for record in results["models"]:
        name, seed = seed_of(record["name"])
        same = repr([name, seed is None, *(record.get(key) for key in _SAME)])
        groups.setdefault(same, []).append((seed, record))
    models = []
    for group in groups.values():
        numbers = [seed for seed, _ in group if seed is not None]
        if len(group) < 2 or len(set(numbers)) < len(group):
            models += [record for _, record in group]
            continue
        name, _ = seed_of(group[0][1]["name"])
        if name in taken:
            name = f"{name} ({len(group)} seeds)"
        taken.add(name)
        models.append(_pool(name, [record for _, record in group], numbers))
    return {**results, "models": models}
