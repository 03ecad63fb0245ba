"""Standard errors and intervals. All are for one model unless the name says ``paired``."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray

_LEVEL = 0.95
_UPPER = (1 + _LEVEL) / 2
_INFORMATIVE = 5  # minimum clusters with a miss, and with a hit, for a design effect
_RESAMPLES = 9999  # random permutations, or all of them if there are fewer
_PERMUTED = 1000  # number of differing items above which Student's t replaces permutations
_EXACT_TRIALS = 64  # below this, approximations cover less than 0.935 at some proportions


class Interval(NamedTuple):
    """A two-sided interval."""

    low: float
    high: float


def mean_and_error(values: Values) -> tuple[float, float]:
    """Return the mean and its standard error (nan for fewer than two values)."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return math.nan, math.nan
    error = float(data.std(ddof=1) / math.sqrt(data.size)) if data.size > 1 else math.nan
    return float(data.mean()), error


def ratio_and_error(numerators: Values, denominators: Values) -> tuple[float, float]:
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


def t_interval(mean: float, error: float, count: int) -> Interval:
    """Return the 95% interval of a mean with this standard error, estimated from ``count`` values.

    Student's t: an error that comes from few values is itself uncertain. Ends are nan for fewer
    than two values.
    """
    if count < 2:
        return Interval(math.nan, math.nan)
    half = float(stats.t.ppf(_UPPER, count - 1)) * error
    return Interval(mean - half, mean + half)


def proportion_interval(successes: float, trials: float) -> Interval:
    """Return a 95% interval of a proportion with a coverage of at least 93%.

    Uses the exact interval (Clopper and Pearson 1934) for fewer than 64 trials, and Agresti and
    Coull's (1998, The American Statistician 52) otherwise. Wilson's covers only 0.84 to 0.87 at
    some proportions near 0 and 1, for any number of trials.

    Args:
        successes: number of correct answers; may be fractional.
        trials: number of answers, or an effective number of independent ones.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    return _proportion(successes, trials, "beta" if trials < _EXACT_TRIALS else "agresti_coull")


def clustered_interval(correct: Values, totals: Values) -> Interval:
    """Return a 95% interval for items that come in clusters (queries of one row).

    The number of trials is the number of items over the design effect (the clustered variance over
    the binomial one), reduced by Student's t for few clusters, in the exact binomial interval (Korn
    and Graubard 1998, Survey Methodology 24). A design effect that rests on fewer than 5 clusters
    with a miss, or with a hit, is not trusted: then each cluster counts as one trial, as if its
    items were all alike. Without clusters (one item each) it is :func:``proportion_interval``.

    Raises:
        ValueError: no items.
    """
    right, asked = (np.asarray(v, dtype=np.float64) for v in (correct, totals))
    right, asked = right[asked > 0], asked[asked > 0]
    items, clusters = float(asked.sum()), len(asked)
    if items == 0:
        raise ValueError("no items to build an interval from")
    proportion, error = ratio_and_error(right, asked)
    if items == clusters:
        return proportion_interval(min(proportion, 1.0) * items, items)
    effective = float(clusters)
    if min((right < asked).sum(), (right > 0).sum()) >= _INFORMATIVE and error > 0:
        shrink = (stats.norm.ppf(_UPPER) / stats.t.ppf(_UPPER, clusters - 1)) ** 2
        found = proportion * (1 - proportion) / error**2
        effective = max(effective, float(min(items, found) * shrink))
    return _proportion(min(proportion, 1.0) * effective, effective, "beta")


def weighted_interval(accuracy: float, error: float, items: int) -> Interval:
    """Return a 95% interval of an accuracy with a known standard error.

    A mean over groups of unequal size has an error of its own; it is turned into an effective
    number of trials (at most ``items``), so that the interval stays in [0, 1] and has a width at 0
    and 1, where such an error is 0.
    """
    effective = float(items)
    if 0 < accuracy < 1 and error > 0:
        effective = min(effective, accuracy * (1 - accuracy) / error**2)
    return proportion_interval(accuracy * effective, effective)


def _proportion(
    successes: float, trials: float, method: Literal["beta", "agresti_coull"]
) -> Interval:
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials > 0, got {successes}/{trials}")
    from statsmodels.stats.proportion import proportion_confint

    found: Any = proportion_confint(successes, trials, alpha=1 - _LEVEL, method=method)
    low, high = found
    # at p = 0 and p = 1 the exact ends are 0 and 1; rounding must not move them
    low = 0.0 if successes == 0 else max(0.0, float(low))
    high = 1.0 if successes == trials else min(1.0, float(high))
    return Interval(low, high)


def above_chance(accuracy: float, chance: float) -> float:
    """Return (accuracy - chance) / (1 - chance): 0 for a guesser, 1 for no error.

    Raises:
        ValueError: ``chance`` is not in [0, 1).
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance must lie in [0, 1), got {chance}")
    return (accuracy - chance) / (1 - chance)


class PairedDifference(NamedTuple):
    """Difference of model A and model B on the same items."""

    difference: float
    interval: Interval
    p_value: float
    items: int


def paired_difference(
    a: Values, b: Values, *, bounded: bool = True, seed: int = 0
) -> PairedDifference:
    """Compare two models on items that both answered.

    Args:
        a: score of the first model on each item.
        b: score of the second model on the same items, in the same order.
        bounded: scores lie in [0, 1] (accuracies); False for losses.
        seed: of the permutations, where there are too many to go through all.

    Returns:
        The mean difference a - b, its 95% interval, and the two-sided p-value that it is zero. The
        p-value is exact for few items: McNemar's test where scores are right or wrong, else all
        assignments of signs to the differences. The interval is Student's; for scores in [0, 1] two
        items are added, one in favour of each model (Bonett and Price 2012, J. Educ. Behav. Stat.
        37), so that it has a width where the models never differ.

    Raises:
        ValueError: the two have different lengths or are empty.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need the same items for both models, got {len(a)} and {len(b)}")
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    # what differs by rounding is equal
    differences = np.where(np.isclose(left, right, rtol=1e-12, atol=1e-12), 0.0, left - right)
    mean, error = mean_and_error(differences)
    if bounded:
        centre, error = _with_pseudo_items(differences)
        low, high = t_interval(centre, error, len(a))
        # no test for a single item
        interval = Interval(-1.0, 1.0) if len(a) < 2 else Interval(max(-1.0, low), min(1.0, high))
    else:
        interval = t_interval(mean, error, len(a))
    return PairedDifference(mean, interval, _paired_p(differences, seed), len(a))


def holm(p_values: Values) -> list[float]:
    """Return p-values corrected for their number (Holm 1979, A simple sequentially rejective
    procedure).

    Rejecting what is below a level keeps the chance of any false rejection below that level. A nan
    stays one and is not counted.
    """
    # imported here: statsmodels loads pandas, which sources of training data do not need
    from statsmodels.stats.multitest import multipletests

    corrected = np.array(p_values, dtype=np.float64)
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected.tolist()


def _with_pseudo_items(differences: np.ndarray) -> tuple[float, float]:
    """Return the centre and standard error with a difference of +1 and one of -1 added."""
    more = np.concatenate([differences, [1.0, -1.0]])
    return float(more.mean()), float(more.std() / math.sqrt(more.size))


def _paired_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p that differences are as likely positive as negative."""
    apart = differences[differences != 0]  # equal items have no information
    if apart.size == 0:
        return 1.0
    if np.allclose(np.abs(apart), abs(apart[0]), rtol=1e-9, atol=0):
        return float(stats.binomtest(int((apart > 0).sum()), apart.size).pvalue)
    if apart.size > _PERMUTED:
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    found = stats.permutation_test(
        (apart,),
        np.sum,
        vectorized=True,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
