"""Several seeds of one layout are one model of the report, with the spread between them."""

import math

import numpy as np
import pytest
from scipy import stats

from hybrid_eval import write_report
from hybrid_eval.contrast import comparisons
from hybrid_eval.models import split_name
from hybrid_eval.pool import pooled, seed_of

COST = {"axis": "cost", "metric": "cache_bytes", "context": 1024, "fixed_bytes": 10}


def result(items, axis="retrieval", metric="accuracy", **more):
    value = float(np.mean(items))
    chance = {"chance": 0.1, "above_chance": (value - 0.1) / 0.9} if metric == "accuracy" else {}
    return {
        **{"axis": axis, "metric": metric, metric: value, "interval": [value, value]},
        **{"items": list(map(float, items)), "n": len(items), "tokens": {"min": 8, "max": 8}},
        **{"options": {}, "truncated": 0, **chance, **more},
    }


def record(name, layout, **results):
    kinds = {"L": ("Lightning", "linear"), "S": ("Softmax", "attention")}
    branches = [
        {"layer": i, "name": kinds[c][0], "kind": kinds[c][1], "local": False}
        for i, c in enumerate(layout)
    ]
    bytes_per_token = layout.count("S") * 64
    cost = {"cache_bytes": 10 + bytes_per_token * 1024, "bytes_per_token": bytes_per_token}
    return {
        **{"name": name, "layout": layout, "parameters": 100, "dtype": "float32"},
        **{"branches": branches, "ablate": None, "without": [], "fingerprint": name},
        "results": {**results, "cost": {**COST, **cost, "options": {}}},
    }


def run(*models):
    return {
        "models": list(models),
        "settings": {"seed": 0},
        "versions": {},
        "created": "today",
        "schema": 2,
    }


def seeds(layout, rates, n=200, loss=2.0, start=0):
    """Models that answer a share of the items rightly: the same items in all seeds."""
    rng = np.random.default_rng([start, len(layout)])
    text = rng.normal(0, 0.3, 64)
    return [
        record(
            f"{layout} seed {seed}",
            layout,
            mqar=result((rng.random(n) < rate).astype(float)),
            heldout=result(loss + text + 0.001 * seed, "language", "bits_per_byte"),
        )
        for seed, rate in enumerate(rates)
    ]


def test_names_of_seeds():
    assert seed_of("LLLS seed 3") == ("LLLS", 3)
    assert seed_of("a-seed-12") == ("a", 12)
    assert seed_of("LLLS seed 3 without attention") == ("LLLS without attention", 3)
    assert seed_of("seedling") == ("seedling", None)
    assert split_name("runs/x/LLLS/seed-0") == ("LLLS seed 0", "runs/x/LLLS/seed-0")
    assert split_name("a=runs/x/LLLS/seed-0") == ("a", "runs/x/LLLS/seed-0")


def test_an_interval_holds_the_seeds_and_the_items():
    models = seeds("LS", [0.9, 0.8, 0.7])
    values = [model["results"]["mqar"]["accuracy"] for model in models]
    (one,) = pooled(run(*models))["models"]
    assert (one["name"], one["seeds"]) == ("LS", [0, 1, 2])
    found = one["results"]["mqar"]
    assert found["accuracy"] == pytest.approx(np.mean(values))
    assert found["above_chance"] == pytest.approx((np.mean(values) - 0.1) / 0.9)
    between = stats.t.ppf(0.975, 2) * stats.sem(values)
    low, high = found["interval"]
    # never narrower than Student's interval over the seeds, and inside of [0, 1]
    assert low <= np.mean(values) - between
    assert high == 1.0
    # seeds that agree leave the items
    same = seeds("LS", [0.9])[0]
    copies = [{**same, "name": f"LS seed {i}"} for i in range(3)]
    low, high = pooled(run(*copies))["models"][0]["results"]["mqar"]["interval"]
    error = math.sqrt(0.9 * 0.1 / 200)
    assert 0.5 < (high - low) / (4 * error) < 2


def test_cells_are_means_and_not_narrower_than_one_seed():
    models = seeds("LS", [0.9, 0.7])
    for model, accuracy in zip(models, (0.9, 0.7), strict=True):
        cell = {"length": 64, "accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]}
        model["results"]["mqar"]["cells"] = [{**cell, "late": accuracy / 2}]
    (cell,) = pooled(run(*models))["models"][0]["results"]["mqar"]["cells"]
    assert cell["accuracy"] == pytest.approx(0.8)
    assert cell["late"] == pytest.approx(0.4)
    assert cell["length"] == 64
    assert cell["interval"][0] <= 0.75
    assert cell["interval"][1] >= 0.85


def test_what_differs_or_stands_alone_is_not_pooled():
    a, b = seeds("LS", [0.9, 0.8])
    assert len(pooled(run(a, {**b, "layout": "SL"}))["models"]) == 2
    assert len(pooled(run(a, {**b, "parameters": 99}))["models"]) == 2
    assert [m["name"] for m in pooled(run(a))["models"]] == ["LS seed 0"]
    assert len(pooled(run(a, {**b, "name": "LS-seed-0"}))["models"]) == 2
    named = [m["name"] for m in pooled(run({**a, "name": "LS"}, a, b))["models"]]
    assert named == ["LS", "LS (2 seeds)"]


def test_models_of_several_seeds_are_compared_seed_by_seed():
    hybrid, full = seeds("LS", [0.9, 0.88, 0.92]), seeds("SS", [0.95, 0.97, 0.96], start=1)
    shown = pooled(run(*hybrid, *full))
    found = {c.task: c for c in comparisons(shown)}["mqar"]
    pairs = [
        b["results"]["mqar"]["accuracy"] - a["results"]["mqar"]["accuracy"]
        for a, b in zip(hybrid, full, strict=True)
    ]
    assert (found.model, found.reference) == ("SS", "LS")
    assert found.found.difference == pytest.approx(np.mean(pairs))
    half = stats.t.ppf(0.975, 2) * stats.sem(pairs)
    assert found.found.interval.low <= np.mean(pairs) - half
    # one seed is not compared with several
    assert not [c for c in comparisons(pooled(run(*hybrid, full[0]))) if c.task == "mqar"]


def test_the_report_shows_seeds_as_one_and_keeps_them_apart_in_its_data(tmp_path):
    models = [*seeds("LS", [0.9, 0.88]), *seeds("SS", [0.95, 0.97], start=1)]
    html = write_report(run(*models), tmp_path).read_text()
    rows = (tmp_path / "tables" / "summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["model", "LS", "SS"]
    assert "means over 2 seeds" in html
    for model in models:
        assert model["name"] in (tmp_path / "results.json").read_text()
