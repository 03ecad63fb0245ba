import math

import numpy as np
import pytest
from scipy import stats

from hybrid_eval.stats import (
    above_chance,
    clustered_interval,
    mean_and_error,
    paired_difference,
    proportion_interval,
    ratio_and_error,
)


def test_few_trials_have_the_interval_of_the_binomial_tails():
    # at either end the answers seen, or more extreme ones, have a chance of 2.5%
    for successes, trials in ((8, 10), (1, 3), (28, 29)):
        low, high = proportion_interval(successes, trials)
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)


def test_many_trials_have_agresti_and_coull_s_interval():
    # z^2 trials more, half of them right, then normal theory
    z = 1.959963984540054
    for successes, trials in ((40, 64), (250, 500)):
        p = (successes + z * z / 2) / (trials + z * z)
        half = z * math.sqrt(p * (1 - p) / (trials + z * z))
        assert proportion_interval(successes, trials) == pytest.approx((p - half, p + half))


def test_intervals_at_the_ends_stay_inside():
    for trials in (3, 20, 64):
        assert proportion_interval(0, trials).low == 0.0
        assert proportion_interval(trials, trials).high == 1.0
        assert proportion_interval(trials, trials).low < 1.0
    with pytest.raises(ValueError, match="3/2"):
        proportion_interval(3, 2)


def test_correlated_items_widen_the_interval():
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.integers(0, 2, 100), 1) * 10.0
    mixed = rng.binomial(10, 0.5, 100).astype(float)
    totals = [10.0] * 100
    wide, narrow = clustered_interval(alike, totals), clustered_interval(mixed, totals)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_error_of_a_ratio_is_the_spread_of_repeated_samples():
    rng = np.random.default_rng(1)
    bytes_ = rng.integers(50, 150, (2000, 40)).astype(float)
    nll = bytes_ * 0.7 + rng.normal(0, 8, bytes_.shape)
    ratios, errors = zip(
        *(ratio_and_error(a, b) for a, b in zip(nll, bytes_, strict=True)), strict=True
    )
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_mean_and_error_of_the_few():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])


def test_chance_is_zero_and_perfection_one():
    assert above_chance(0.25, 0.25) == 0
    assert above_chance(1.0, 0.25) == 1
    with pytest.raises(ValueError, match="chance"):
        above_chance(0.5, 1.0)


def test_a_paired_comparison_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(2)
    hard = rng.random(400) < 0.5
    a = hard.astype(float)
    b = a.copy()
    b[np.flatnonzero(hard)[:15]] = 0  # b misses 15 items that a has
    found = paired_difference(a, b)
    assert found.difference == pytest.approx(15 / 400)
    assert found.interval.low > 0
    assert found.p_value < 0.01
    # while each model's own interval covers the other's score
    assert proportion_interval(b.sum(), 400).high > a.mean()
    same = paired_difference(a, a)
    assert (same.difference, same.p_value) == (0, 1)


def test_a_paired_comparison_needs_pairs():
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 0.0])
