import math

import numpy as np
import pytest

from hybrid_eval.stats import (
    above_chance,
    clustered_interval,
    mean_and_error,
    paired_difference,
    ratio_and_error,
    wilson,
)


def test_wilson_agrees_with_the_equation_that_defines_it():
    # the ends solve |p_hat - p| = z sqrt(p (1 - p) / n)
    for successes, trials in ((8, 10), (1, 30), (250, 500)):
        for end in wilson(successes, trials):
            left = abs(successes / trials - end)
            assert left == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials))


def test_wilson_at_the_ends_stays_inside():
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low < 1.0
    with pytest.raises(ValueError, match="3/2"):
        wilson(3, 2)


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
    assert wilson(b.sum(), 400).high > a.mean()
    same = paired_difference(a, a)
    assert (same.difference, same.p_value) == (0, 1)


def test_a_paired_comparison_needs_pairs():
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 0.0])
