"""Means over few seeds, their intervals, paired differences, and many of them at once.

Student's t throughout. Its distribution for whole degrees of freedom is a finite sum (Abramowitz and
Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4), so nothing beyond the standard library
is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its interval; the ends are nan for fewer than two values."""

    mean: float
    low: float
    high: float
    n: int


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) for Student's t with `freedom` degrees of freedom, a whole number from 1."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total


def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence, in (0, 1)."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """The mean of independent values and its two-sided t-interval."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = t_quantile(confidence, n - 1) * _error(values, mean)
    return Estimate(mean, mean - half, mean + half, n)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the t-test that the mean of paired differences is 0; nan below two pairs."""
    n = len(differences)
    if n < 2:
        return math.nan
    mean = math.fsum(differences) / n
    error = _error(differences, mean)
    if error == 0:
        # no spread at all: the same difference for every seed
        return 1.0 if mean == 0 else 0.0
    return max(0.0, 1 - t_within(mean / error, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, A simple sequentially rejective procedure).

    Rejecting what is below a level keeps the chance of any false rejection below that level. A nan
    stays one and is not counted.
    """
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
    )
    corrected, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _error(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
