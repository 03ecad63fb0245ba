"""Means over few seeds, their intervals, and paired differences.

A mean over seeds has two sources of uncertainty: the seeds, and the items of the evaluation,
which all seeds share, so that more seeds do not reduce it. With V_s and V_i the variances of
the mean from each source, and t_s and t_i Student's quantiles at their degrees of freedom, an
interval is

    mean +- sqrt(t_s^2 V_s + t_i^2 V_i)

It is never narrower than Student's interval over seeds. A p-value is the level at which 0 leaves
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEWEST_PAIRS = 3  # minimum number of pairs of seeds for a verdict
ROUNDING = 1e-9  # relative spread below which values count as equal


class Estimate(NamedTuple):
    """A mean and its interval; the ends are NaN for fewer than two values, or without a spread."""

    mean: float
    low: float
    high: float
    n: int


class Score(NamedTuple):
    """Score of an evaluation.

    Attributes:
        value: the metric.
        items: scores of which it is the mean, one for each question, row or window; the same items
            in the same order for every checkpoint. Empty if not known.
        bounded: whether scores are in [0, 1] (an accuracy).
    """

    value: float
    items: tuple[float, ...] = ()
    bounded: bool = False


class Sampling(NamedTuple):
    """Standard error of a mean due to the items of the evaluation.

    Attributes:
        error: the standard error; 0 without items, e.g. for a training loss.
        items: number of items.
        low: smallest possible mean.
        high: largest possible mean.
    """

    error: float = 0.0
    items: int = 0
    low: float = -math.inf
    high: float = math.inf


NO_ITEMS = Sampling()


def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = confidence, in (0, 1)."""
    return _t_beyond(1 - confidence, freedom)


def estimate(values: Sequence[float], confidence: float, sampling: Sampling = NO_ITEMS) -> Estimate:
    """Return the mean over seeds and its two-sided interval.

    Values that are all equal, without items, have no interval, since a coarse metric often has
    equal results for few seeds.
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    error = _spread(values)
    if n == 1 or (error == 0 and sampling.error == 0):
        return Estimate(mean, math.nan, math.nan, n)
    half = _half(1 - confidence, error, n, sampling)
    return Estimate(mean, max(sampling.low, mean - half), min(sampling.high, mean + half), n)


def p_value(differences: Sequence[float], sampling: Sampling = NO_ITEMS) -> float:
    """Return the two-sided p-value that the mean of paired differences is 0; NaN without an
    interval.
    """
    from scipy import optimize, special

    n = len(differences)
    if n < 2:
        return math.nan
    mean, error = abs(math.fsum(differences) / n), _spread(differences)
    if mean <= ROUNDING * max(1.0, *map(abs, differences)):
        return 1.0  # equal
    if error == 0 and sampling.error == 0:
        return math.nan
    if sampling.error == 0:
        return float(2 * special.stdtr(n - 1, -mean / error))

    def beyond(log_p: float) -> float:
        return _half(math.exp(log_p), error, n, sampling) - mean

    smallest = -30.0  # p-values below e^-30 are not distinguished
    found: Any = optimize.brentq(beyond, smallest, 0.0) if beyond(smallest) > 0 else smallest
    return math.exp(found)


def sampling_of(scores: Sequence[Score]) -> Sampling:
    """Return the standard error of a mean over seeds due to the items.

    For scores in [0, 1], two correct and two wrong items are added (Agresti and Coull 1998, The
    American Statistician 52), so that a perfect score has an error above 0.
    """
    if not _comparable(scores):
        return Sampling(0.0, 0, *((0.0, 1.0) if _bounded(scores) else ()))
    items = np.mean([score.items for score in scores], axis=0)
    if not _bounded(scores):
        return _sampling(items, [])
    return _sampling(items, [1.0, 1.0, 0.0, 0.0])._replace(low=0.0, high=1.0)


def sampling_of_difference(changed: Sequence[Score], unchanged: Sequence[Score]) -> Sampling:
    """Return the standard error of the mean of paired differences due to the items.

    For scores in [0, 1] two items are added, one in favour of each (Bonett and Price 2012, Journal
    of Educational and Behavioral Statistics 37).
    """
    both = [*changed, *unchanged]
    ends = (-1.0, 1.0) if _bounded(both) else (-math.inf, math.inf)
    if not _comparable(both):
        return Sampling(0.0, 0, *ends)
    mine, other = (np.mean([s.items for s in scores], axis=0) for scores in (changed, unchanged))
    added = [1.0, -1.0] if _bounded(both) else []
    return _sampling(mine - other, added)._replace(low=ends[0], high=ends[1])


def _half(alpha: float, error: float, n: int, sampling: Sampling) -> float:
    """Return half the width of the interval with error probability ``alpha``."""
    half = _t_beyond(alpha, n - 1) * error
    if sampling.error:
        half = math.hypot(half, _t_beyond(alpha, sampling.items - 1) * sampling.error)
    return half


def _t_beyond(alpha: float, freedom: int) -> float:
    """Return the t with P(|T| > t) = alpha."""
    from scipy import special

    return -float(special.stdtrit(freedom, alpha / 2))


def _spread(values: Sequence[float]) -> float:
    """Return the standard error of a mean; 0 for values equal up to rounding, or fewer than two."""
    if len(values) < 2:
        return 0.0
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return 0.0 if error <= ROUNDING * max(map(abs, values)) else error


def _sampling(items: Any, added: Sequence[float]) -> Sampling:
    """Return the error of the mean of these items, at least that with the added items."""
    more = np.concatenate([items, added])
    plain = float(items.std(ddof=1)) / math.sqrt(items.size)
    return Sampling(max(plain, float(more.std()) / math.sqrt(more.size)), len(items))


def _comparable(scores: Sequence[Score]) -> bool:
    """Return whether all have the same number of items, at least two."""
    counts = {len(score.items) for score in scores}
    return len(counts) == 1 and counts.pop() > 1


def _bounded(scores: Sequence[Score]) -> bool:
    return bool(scores) and all(score.bounded for score in scores)
