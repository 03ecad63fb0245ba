"""Comparisons between the models of a run: paired differences, cache sizes, attention shares."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from . import seeds
from .pool import Record, score_of
from .stats import Interval, PairedDifference, above_chance, holm, paired_difference


class Comparison(NamedTuple):
    """Difference of a model from the reference on one task."""

    task: str
    metric: str
    model: str
    reference: str
    found: PairedDifference
    p_holm: float  # corrected for all comparisons of the run


def comparison(model: Record, reference: Record, task: str) -> PairedDifference | None:
    """Return the difference of two models on identical items, or None if the items differ.

    The items of a task are identical for two models if the settings of the run, the options of the
    task and the true token counts are equal: models with different tokenizers have different
    prompts. Models with several seeds are compared by seed, see :mod:``hybrid_eval.seeds``.
    """
    mine, base = model["results"].get(task), reference["results"].get(task)
    if mine is None or base is None or "items" not in mine:
        return None
    if len(mine["items"]) != len(base.get("items", ())):
        return None
    if mine["tokens"] != base["tokens"] or mine["options"] != base["options"]:
        return None
    if "seeds" in model or "seeds" in reference:
        return _over_seeds(model, reference, task)
    bounded = "chance" in mine or mine["metric"] == "accuracy"
    return paired_difference(mine["items"], base["items"], bounded=bounded)


def _over_seeds(model: Record, reference: Record, task: str) -> PairedDifference | None:
    """Compare two models that were trained with the same seeds, at least two of them."""
    common = [seed for seed in model.get("seeds", ()) if seed in reference.get("seeds", ())]
    if len(common) < 2:
        return None
    changed, unchanged = (
        [
            score_of(record["replicas"][record["seeds"].index(seed)]["results"][task])
            for seed in common
        ]
        for record in (model, reference)
    )
    # differences by rounding count as equal
    differences = [
        0.0 if math.isclose(a.value, b.value, rel_tol=1e-12) else a.value - b.value
        for a, b in zip(changed, unchanged, strict=True)
    ]
    sampling = seeds.sampling_of_difference(changed, unchanged)
    found = seeds.estimate(differences, 0.95, sampling)
    interval = Interval(found.low, found.high)
    p_value = seeds.p_value(differences, sampling)
    return PairedDifference(found.mean, interval, p_value, len(changed[0].items))


def comparisons(results: Record) -> list[Comparison]:
    """Compare every model with the first, on identical items only."""
    reference, *others = results["models"]
    pairs = []
    for other in others:
        for task, mine in other["results"].items():
            found = comparison(other, reference, task)
            if found is not None:
                metric = mine["metric"].replace("_", " ")
                pairs.append((task, metric, other["name"], reference["name"], found))
    corrected_ps = holm([found.p_value for *_, found in pairs])
    return [Comparison(*pair, p) for pair, p in zip(pairs, corrected_ps, strict=True)]


def cheaper_from(model: Record, full: Record) -> int | None:
    """Return the context length from which ``model`` has the smaller cache, or None.

    Args:
        model: result of the cost task.
        full: result of the cost task of the other model.
    """
    gain = full["bytes_per_token"] - model["bytes_per_token"]
    debt = model["fixed_bytes"] - full["fixed_bytes"]
    if gain > 0:
        # the first whole number of tokens at which fixed + per_token * n is smaller
        return max(0, debt // gain + 1) if debt >= 0 else 0
    return 0 if gain == 0 and debt < 0 else None


def attention_share(record: Record) -> float | None:
    """Return the share of token-mixing layers with full softmax attention.

    None if the mixers of the model are not known.
    """
    branches = record.get("branches")
    if not branches:
        return None
    layers = {branch["layer"] for branch in branches}
    full = {b["layer"] for b in branches if b["kind"] == "attention" and not b["local"]}
    return len(full) / len(layers)


def corrected(result: Record) -> tuple[float, float, float]:
    """Return (accuracy - chance) / (1 - chance) with its interval."""
    ends = (result["accuracy"], *result["interval"])
    value, low, high = (above_chance(end, result["chance"]) for end in ends)
    return value, low, high


def aggregate(record: Record, tasks: Sequence[str]) -> tuple[float, float, float]:
    """Return the mean of several tasks above chance, each with the same weight, and its interval.

    The samples of the tasks are independent, so squares of the half-widths are added, separately
    for the lower and the upper half.
    """
    parts = [corrected(record["results"][task]) for task in tasks]
    value = sum(part[0] for part in parts) / len(parts)
    below = math.sqrt(sum((v - low) ** 2 for v, low, _ in parts)) / len(parts)
    above = math.sqrt(sum((high - v) ** 2 for v, _, high in parts)) / len(parts)
    return value, value - below, min(1.0, value + above)
