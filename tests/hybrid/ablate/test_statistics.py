"""Simulations of ablations without effect, and of intervals around a known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from hybrid.ablate import plan_runs, summarise
from hybrid.ablate.config import parse_ablation
from hybrid.ablate.report import markdown
from hybrid.ablate.runs import Measured
from hybrid_eval.seeds import (
    Score,
    estimate,
    p_value,
    sampling_of,
    sampling_of_difference,
)

CHANGES, DRAWS = 4, 300
COARSE = [(n, p) for n in (20, 64) for p in (0.5, 0.9, 0.99)]
SEEDS = [2, 3, 5]


def accuracies(rng, seeds, n, p, named=True):
    """Scores of one variant: each seed answers `n` questions, each rightly with chance `p`."""
    rows = (rng.random((seeds, n)) < p).astype(float)
    return [Score(float(row.mean()), tuple(row) if named else (), named) for row in rows]


def students(values, confidence=0.95):
    """Student's t-interval over seeds and its p, whatever the spread."""
    mean, error = np.mean(values), stats.sem(values)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, len(values) - 1) if error else float(mean == 0)
    return mean - half, mean + half, p


def ours(changed, unchanged):
    differences = [a.value - b.value for a, b in zip(changed, unchanged, strict=True)]
    sampling = sampling_of_difference(changed, unchanged)
    return (*estimate(differences, 0.95, sampling)[1:3], p_value(differences, sampling))


def old(changed, unchanged):
    return students([round(a.value - b.value, 9) for a, b in zip(changed, unchanged, strict=True)])


def alarms(draw, procedure):
    """Share of ablations without effect that call any change one, after Holm, and of misses of 0."""
    any_called = missed = 0
    for _ in range(DRAWS):
        baseline, *others = (draw() for _ in range(CHANGES + 1))
        found = [procedure(other, baseline) for other in others]
        outside = [not low <= 0 <= high and not math.isnan(low) for low, high, _ in found]
        missed += sum(outside)
        # the first step of Holm's procedure: the smallest p, times their number
        any_called += any(
            out and p * CHANGES < 0.05 for out, (*_, p) in zip(outside, found, strict=True)
        )
    return any_called / DRAWS, missed / DRAWS / CHANGES


# 0.05, and three standard errors of a share that is estimated from so many draws
PROMISED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("n", "p"), COARSE)
def test_accuracies_without_an_effect_are_rarely_called_one(seeds, n, p):
    rng = np.random.default_rng([seeds, n, int(100 * p)])
    called, missed = alarms(lambda: accuracies(rng, seeds, n, p), ours)
    assert called <= 0.06
    assert missed <= 0.06


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("n", [20, 64])
def test_the_same_without_the_items(seeds, n):
    rng = np.random.default_rng([seeds, n])
    called, missed = alarms(lambda: accuracies(rng, seeds, n, 0.9, named=False), ours)
    assert called <= PROMISED
    assert missed <= PROMISED


@pytest.mark.parametrize("seeds", SEEDS)
def test_gaussian_metrics_keep_the_level(seeds):
    rng = np.random.default_rng(seeds)
    called, missed = alarms(lambda: [Score(float(v)) for v in rng.normal(size=seeds)], ours)
    assert called <= PROMISED
    assert missed == pytest.approx(0.05, abs=0.025)


def test_student_s_t_over_two_seeds_does_not_keep_it():
    """The procedure that this one replaces."""
    rng = np.random.default_rng(0)
    called, missed = alarms(lambda: accuracies(rng, 2, 20, 0.9), old)
    assert called > 0.2
    assert missed > 0.06


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("n", "p"), COARSE)
def test_the_interval_of_an_accuracy_holds_the_truth(seeds, n, p):
    rng = np.random.default_rng([seeds, n, int(100 * p), 1])
    hits = 0
    for _ in range(DRAWS):
        scores = accuracies(rng, seeds, n, p)
        _, low, high, _ = estimate([s.value for s in scores], 0.95, sampling_of(scores))
        assert 0 <= low <= high <= 1
        hits += low <= p <= high
    assert hits / DRAWS >= 0.93


def test_student_s_interval_of_a_near_perfect_score_does_not():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(DRAWS):
        low, high, _ = students([s.value for s in accuracies(rng, 3, 20, 0.99)])
        hits += low <= 0.99 <= high
    assert hits / DRAWS < 0.6


def test_items_that_all_seeds_share_do_not_average_out():
    """Five seeds that answer the same 20 questions alike have asked 20 questions, not 100."""
    rng = np.random.default_rng(3)
    hits = naive = 0
    for _ in range(DRAWS):
        hard = rng.random(20)
        rows = (0.9 * hard + 0.1 * rng.random((5, 20)) < 0.5).astype(float)  # right half the time
        scores = [Score(float(row.mean()), tuple(row), True) for row in rows]
        _, low, high, _ = estimate([s.value for s in scores], 0.95, sampling_of(scores))
        hits += low <= 0.5 <= high
        low, high, _ = students([s.value for s in scores])
        naive += low <= 0.5 <= high
    assert hits / DRAWS >= 0.93
    assert naive / DRAWS < 0.6


def test_an_effect_is_still_seen():
    """From 0.6 to 0.95 on 64 questions with three seeds, nearly always."""
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(100):
        low, _, p = ours(accuracies(rng, 3, 64, 0.95), accuracies(rng, 3, 64, 0.6))
        found += low > 0 and p < 0.05
    assert found >= 80


def test_an_interval_with_items_and_its_p_agree():
    rng = np.random.default_rng(5)
    changed, unchanged = accuracies(rng, 3, 64, 0.95), accuracies(rng, 3, 64, 0.6)
    differences = [a.value - b.value for a, b in zip(changed, unchanged, strict=True)]
    sampling = sampling_of_difference(changed, unchanged)
    edge = 1 - p_value(differences, sampling)
    assert estimate(differences, edge, sampling).low == pytest.approx(0, abs=1e-9)
    # and it is not narrower than Student's
    assert estimate(differences, 0.95, sampling).low < students(differences)[0]


def test_equal_differences_by_rounding_have_no_spread():
    differences = [0.55 - 0.5, 0.6 - 0.55, 0.1 - 0.05]
    assert len(set(differences)) > 1
    assert math.isnan(p_value(differences))
    assert math.isnan(estimate(differences, 0.95).low)
    assert p_value([0.3 - 0.1 - 0.2] * 3) == 1


# In the report


def report(seeds, found, tmp_path):
    """The report of one change; `found` gives a Score for each variant and seed."""
    ablation = parse_ablation(
        {
            "name": "made",
            "baseline": {
                "model": {"layout": "L", "hidden_size": 16, "mixers": {"L": {"num_heads": 2}}},
                "data": {"source": "mqar", "pairs": 3},
                "sequence_length": 16,
                "training": {"max_steps": 1},
            },
            "changes": {"new": {"training.data_seed": 77}},
            "seeds": seeds,
            "out": str(tmp_path),
        }
    )
    measured = []
    for name in ("baseline", "new"):
        for seed in range(seeds):
            score = found(name, seed)
            scores = {"loss": score} if isinstance(score, Score) else {}
            value = score.value if isinstance(score, Score) else score
            measured.append(Measured(name, seed, "", {"loss": value}, 1.0, 1.0, scores=scores))
    return summarise(plan_runs(ablation), measured)


def test_equal_differences_are_not_established(tmp_path):
    made = report(3, lambda name, seed: 0.5 + 0.05 * (name == "new") + 0.1 * seed, tmp_path)
    (effect,) = made["effects"]
    assert effect["verdict"] == "equal for all seeds: no interval"
    assert effect["low"] is effect["p"] is None
    assert "no spread over seeds" in markdown(made)


def test_two_seeds_give_no_verdict(tmp_path):
    made = report(2, lambda name, seed: 1.0 * (name == "new") + 1e-3 * seed**2, tmp_path)
    (effect,) = made["effects"]
    assert effect["verdict"] == "2 pairs of seeds: a verdict requires 3"


def test_items_give_equal_differences_an_interval(tmp_path):
    right = {"baseline": 5, "new": 15}

    def found(name, seed):
        items = tuple(float(i < right[name]) for i in range(20))
        return Score(sum(items) / 20, items, True)

    (effect,) = report(3, found, tmp_path)["effects"]
    assert 0 < effect["low"] < 0.5 < effect["high"] <= 1
    assert effect["verdict"] == "worse"  # of a loss
    right["new"] = 6  # one question of 20 more is not an effect
    (effect,) = report(3, found, tmp_path)["effects"]
    assert effect["verdict"] == "noise"
