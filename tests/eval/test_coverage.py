"""Simulations: 95% intervals hold what they promise, and p-values raise few false alarms.

Every simulation is also run on the textbook procedure that it is there to catch, which has to fail.
"""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from hybrid_eval.stats import (
    clustered_interval,
    holm,
    paired_difference,
    proportion_interval,
    ratio_and_error,
    t_interval,
    weighted_interval,
)

DRAWS = 400
# of the estimated share itself, at 0.95 and DRAWS draws: three standard errors
SLACK = 3 * np.sqrt(0.95 * 0.05 / DRAWS)


def clusters(rng, count, items, p, alike):
    """Right answers in each cluster; `alike` is the correlation of answers in one cluster."""
    if alike == 0:
        shares = np.full(count, p)
    elif alike == 1:
        shares = (rng.random(count) < p).astype(float)
    else:
        scale = 1 / alike - 1
        shares = rng.beta(p * scale, (1 - p) * scale, count)
    return rng.binomial(items, shares)


def by_items(correct, totals):
    """Items counted as independent, normal theory."""
    return proportion_confint(sum(correct), sum(totals), method="normal")


def by_design_effect(correct, totals):
    """A design effect that is believed whatever it rests on, and z for any number of clusters."""
    p, error = ratio_and_error(correct, totals)
    trials = sum(totals)
    if 0 < p < 1 and error > 0:
        trials = min(trials, max(len(totals), p * (1 - p) / error**2))
    return proportion_confint(p * trials, trials, method="wilson")


def coverage(interval, count, items, p, alike):
    rng = np.random.default_rng([count, items, int(100 * p), int(100 * alike)])
    hits = 0
    for _ in range(DRAWS):
        low, high = interval(clusters(rng, count, items, p, alike), [items] * count)
        assert 0 <= low <= high <= 1
        hits += low <= p <= high
    return hits / DRAWS


@pytest.mark.parametrize("count", [3, 5, 10, 20, 64])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_clustered_intervals_hold_the_truth(count, p):
    for items in (4, 32):
        for alike in (0, 0.1, 0.5, 1):
            found = coverage(clustered_interval, count, items, p, alike)
            assert found >= 0.95 - SLACK, (items, alike)


@pytest.mark.parametrize(
    ("count", "p", "alike"), [(3, 0.9, 0.5), (5, 0.9, 1), (10, 0.9, 0.9), (64, 0.99, 0.9)]
)
def test_believing_any_design_effect_does_not(count, p, alike):
    assert coverage(by_design_effect, count, 32, p, alike) < 0.85
    assert coverage(clustered_interval, count, 32, p, alike) >= 0.95 - SLACK


def test_one_cluster_or_a_perfect_score_is_not_certainty():
    assert clustered_interval([10], [10]).low < 0.1
    # ten rows of ten right answers may be ten right answers
    perfect = clustered_interval([10] * 10, [10] * 10)
    assert perfect.high == 1
    assert perfect.low == pytest.approx(stats.beta.ppf(0.025, 10, 1))
    # an unanswered cluster is none
    assert clustered_interval([10, 0, 9], [10, 0, 10]) == clustered_interval([10, 9], [10, 10])


def test_items_that_are_not_clustered_have_the_interval_of_a_proportion():
    assert clustered_interval([1, 0, 1, 1], [1] * 4) == proportion_interval(3, 4)


def exact_coverage(interval, n, ps):
    """How often an interval holds each p, over the binomial distribution."""
    low, high = np.transpose([interval(k, n) for k in range(n + 1)])
    masses = stats.binom.pmf(np.arange(n + 1)[:, None], n, ps)
    return (masses * ((low[:, None] <= ps) & (ps <= high[:, None]))).sum(0)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12, 14, 15, 20, 31, 63, 64, 65, 200])
def test_intervals_of_a_proportion_hold_the_truth_whatever_it_is(n):
    ps = np.linspace(0.0005, 0.9995, 1999)
    assert exact_coverage(proportion_interval, n, ps).min() >= 0.93


@pytest.mark.parametrize("n", [5, 10, 64])
def test_wilson_s_interval_does_not(n):
    def wilson(k, n):
        return proportion_confint(k, n, method="wilson")

    assert exact_coverage(wilson, n, np.linspace(0.0005, 0.9995, 1999)).min() < 0.86


def test_an_accuracy_with_a_given_error_stays_in_its_range():
    assert weighted_interval(1.0, 0.0, 50) == proportion_interval(50, 50)
    low, high = weighted_interval(0.98, 0.05, 200)
    assert 0 < low < 0.98 < high <= 1
    assert high - low > proportion_interval(196, 200).high - proportion_interval(196, 200).low
    # an error too small for the items is not believed
    assert weighted_interval(0.5, 1e-9, 100) == proportion_interval(50, 100)


def test_a_mean_of_few_windows_has_student_s_interval():
    rng = np.random.default_rng(0)
    hits = {"t": 0, "z": 0}
    for _ in range(2000):
        values = rng.normal(1.0, 0.2, 4)
        mean, error = values.mean(), stats.sem(values)
        low, high = t_interval(mean, error, 4)
        hits["t"] += low <= 1 <= high
        hits["z"] += abs(mean - 1) <= 1.96 * error
    assert hits["t"] / 2000 == pytest.approx(0.95, abs=0.015)
    assert hits["z"] / 2000 < 0.9
    assert np.isnan(t_interval(1.0, float("nan"), 1)).all()


# Paired comparisons


def pairs(rng, n, p, gain=0.0):
    """Right or wrong of two models that share what is hard."""
    hard = rng.random(n)
    mine, other = (rng.random(n) * 0.5 + hard * 0.5 for _ in range(2))
    return (mine < p + gain).astype(float), (other < p).astype(float)


def bootstrap(a, b, resamples=300):
    """Percentiles of resampled means, and the p-value that goes with them."""
    d = a - b
    means = np.random.default_rng(0).choice(d, (resamples, d.size)).mean(1)
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return np.quantile(means, [0.025, 0.975]), min(1, 2 * tail)


@pytest.mark.parametrize("n", [5, 10, 20, 64])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_models_that_are_equal_are_rarely_told_apart(n, p):
    rng = np.random.default_rng([n, int(100 * p)])
    found = [paired_difference(*pairs(rng, n, p)) for _ in range(DRAWS)]
    assert np.mean([f.p_value < 0.05 for f in found]) <= 0.05 + SLACK
    assert np.mean([f.interval.low <= 0 <= f.interval.high for f in found]) >= 0.95 - SLACK
    assert all(-1 <= f.interval.low <= f.interval.high <= 1 for f in found)


def test_a_bootstrap_of_few_items_tells_equal_models_apart():
    rng = np.random.default_rng(7)
    alarms = {"bootstrap": 0, "exact": 0}
    for _ in range(DRAWS):
        a, b = rng.normal(size=(2, 5))
        alarms["bootstrap"] += bootstrap(a, b)[1] < 0.05
        alarms["exact"] += paired_difference(a, b, bounded=False).p_value < 0.05
    assert alarms["bootstrap"] / DRAWS > 0.05 + SLACK
    assert alarms["exact"] / DRAWS <= 0.05 + SLACK


@pytest.mark.parametrize("n", [10, 20, 64])
def test_the_interval_of_a_difference_holds_the_truth(n):
    rng = np.random.default_rng(n)
    a, b = pairs(rng, 200_000, 0.7, 0.15)
    truth = (a - b).mean()
    hits = 0
    for _ in range(DRAWS):
        low, high = paired_difference(*pairs(rng, n, 0.7, 0.15)).interval
        hits += low <= truth <= high
    assert hits / DRAWS >= 0.95 - SLACK


def test_right_or_wrong_is_mcnemar_s_exact_test():
    # 8 items where only the first is right, 1 where only the second is
    a, b = np.array([1.0] * 8 + [0.0] + [1.0] * 20), np.array([0.0] * 8 + [1.0] + [1.0] * 20)
    assert paired_difference(a, b).p_value == pytest.approx(2 * (1 + 9) / 2**9)


def test_few_graded_items_go_through_every_assignment_of_signs():
    # of 2^5 assignments only all plus and all minus are as extreme
    found = paired_difference([0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.1, 0.1, 0.1, 0.1])
    assert found.p_value == pytest.approx(2 / 32)


def test_models_that_never_differ_on_few_items_may_differ():
    same = paired_difference([1.0] * 20, [1.0] * 20)
    assert (same.difference, same.p_value) == (0, 1)
    assert same.interval.low < -0.05
    assert same.interval.high > 0.05
    (low, high) = paired_difference([1.0], [0.0]).interval
    assert (low, high) == (-1, 1)


def test_rounding_is_not_a_difference():
    a, b = [0.1 + 0.2] * 6, [0.3] * 6
    assert paired_difference(a, b).p_value == 1


def test_holm_s_correction_grows_with_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
