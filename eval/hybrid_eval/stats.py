"""Standard errors and intervals. All are for one model unless the name says ``paired``."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """A two-sided interval."""

    low: float
    high: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (nan for fewer than two values)."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return math.nan, math.nan
    error = float(data.std(ddof=1) / math.sqrt(data.size)) if data.size > 1 else math.nan
    return float(data.mean()), error


def ratio_and_error(numerators: Sequence[float], denominators: Sequence[float]):
    """Return sum(numerators) / sum(denominators) and its linearised standard error.

    Each pair is one cluster (a window of text, a row of queries): the error counts clusters, not
    the correlated items inside them (Cochran, Sampling Techniques, eq. 6.13 without the finite
    population term).
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if bottom.sum() == 0:
        return math.nan, math.nan
    ratio = float(top.sum() / bottom.sum())
    count = top.size
    if count < 2:
        return ratio, math.nan
    squares = float(((top - ratio * bottom) ** 2).sum())
    return ratio, math.sqrt(squares * count / (count - 1)) / float(bottom.sum())


def wilson(successes: float, trials: float, z: float = Z_95) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927).

    ``trials`` may be an effective number of independent trials and need not be whole.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials > 0, got {successes}/{trials}")
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / scale
    # at p = 0 and p = 1 the exact ends are 0 and 1; rounding must not move them
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(low, high)


def clustered_wilson(correct: Sequence[float], totals: Sequence[float]) -> Interval:
    """Return a Wilson interval for items that come in clusters (queries of one row).

    The number of trials is divided by the design effect: the clustered variance over the
    binomial one (never below 1 trial per cluster, never above the number of items).
    """
    proportion, error = ratio_and_error(correct, totals)
    items, clusters = float(np.sum(totals)), len(totals)
    if items == 0:
        raise ValueError("no items to build an interval from")
    effective = items
    if clusters > 1 and 0 < proportion < 1 and error > 0:
        effective = min(items, max(clusters, proportion * (1 - proportion) / error**2))
    return wilson(min(proportion, 1.0) * effective, effective)


def above_chance(accuracy: float, chance: float) -> float:
    """Return (accuracy - chance) / (1 - chance): 0 for a guesser, 1 for no error.

    Raises:
        ValueError: ``chance`` is not in [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance must lie in [0, 1), got {chance}")
    return (accuracy - chance) / (1 - chance)


class PairedDifference(NamedTuple):
    """How much model A beats model B on the same items."""

    difference: float
    interval: Interval
    p_value: float
    items: int


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Bootstrap the mean difference a - b over items that both models answered.

    Args:
        a: score of the first model on each item.
        b: score of the second model on the same items, in the same order.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        The difference, its 95% percentile interval, and the two-sided bootstrap p-value that the
        difference is zero.

    Raises:
        ValueError: the two have different lengths or are empty.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need the same items for both models, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # one resample at a time: the index matrix of a large benchmark would not fit
    means = np.array(
        [rng.choice(differences, differences.size).mean() for _ in range(resamples)],
    )
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    # add-one: a bootstrap cannot show a p-value below its own resolution
    p_value = min(1.0, 2 * (tail * resamples + 1) / (resamples + 1))
    return PairedDifference(
        float(differences.mean()), Interval(float(low), float(high)), p_value, len(a)
    )
