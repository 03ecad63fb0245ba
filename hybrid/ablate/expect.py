"""Predictions about an ablation, and whether its results agree with them.

    METRIC: VARIANT > VARIANT            the interval of the difference lies above 0
    METRIC: VARIANT > 0.9                the interval of the mean lies above 0.9
    METRIC: VARIANT < VARIANT by 0.2     the difference is at least 0.2
    METRIC: VARIANT > VARIANT by -0.02   the first is at most 0.02 below the second
    ... at pairs=64, length=256          in one cell of the grid, in one cell of the metric
    baseline@width=128 > baseline@width=32      two cells of the grid

Without METRIC the first of ``metrics`` is used. In a grid, a prediction without a cell must hold in
every cell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybrid.ablate.metrics import Metric, parse_metric
from hybrid_eval.seeds import (
    FEWEST_PAIRS,
    Sampling,
    Score,
    estimate,
    sampling_of,
    sampling_of_difference,
)

FORM = "[METRIC:] VARIANT > VARIANT or NUMBER [by NUMBER] [at KEY=VALUE, ...]"
_FORM = re.compile(
    r"(?:(?P<metric>.+?):\s+)?(?P<left>[\w.+-]+)(?:@(?P<there>\S+))?\s*(?P<sign>[<>])"
    r"\s*(?P<right>[\w.+-]+)(?:@(?P<other>\S+))?"
    r"(?:\s+by\s+(?P<by>\S+))?(?:\s+at\s+(?P<at>.+))?"
)
Verdict = Literal["holds", "fails", "open"]


@dataclass(frozen=True)
class Prediction:
    """One prediction.

    Attributes:
        text: the text of the config.
        metric: the metric to compare.
        left: name of a variant.
        above: whether ``left`` is predicted to be larger.
        right: name of a variant, or a number.
        by: the smallest difference; a negative value is a tolerance.
        cell: axis and label of the grid, for a prediction about one cell.
        left_cell: axis and label of the left side only.
        right_cell: axis and label of the right side only.
    """

    text: str
    metric: Metric
    left: str
    above: bool
    right: str | float
    by: float = 0.0
    cell: tuple[tuple[str, str], ...] = ()
    left_cell: tuple[tuple[str, str], ...] = ()
    right_cell: tuple[tuple[str, str], ...] = ()

    @property
    def fixed(self) -> set[str]:
        """Return the axes for which both sides have their own cell."""
        left, right = ({axis for axis, _ in cell} for cell in (self.left_cell, self.right_cell))
        return left & right if isinstance(self.right, str) else left


@dataclass(frozen=True)
class Outcome:
    """The result of a prediction in one cell.

    Attributes:
        text: the prediction.
        cell: label of the cell, empty without a grid.
        mean, low, high: of the difference between left and right; nan if there is no interval.
        verdict: ``holds`` if the whole interval agrees, ``fails`` if no part of it does, otherwise
            ``open``.
        why: the reason if the verdict is open.
    """

    text: str
    cell: str
    mean: float
    low: float
    high: float
    verdict: Verdict
    why: str = ""


def parse_prediction(
    text: str, metrics: Sequence[str], axes: Mapping[str, Sequence[str]]
) -> Prediction:
    """Parse a prediction.

    Args:
        text: see the head of this file.
        metrics: metrics of the ablation; the first is the default.
        axes: axes of the grid, with their labels.

    Raises:
        ValueError: another form, or a cell that is not in the grid.
    """
    found = _FORM.fullmatch(" ".join(text.split()))
    if found is None:
        raise ValueError(f"expected {FORM}, got {text!r}")
    metric = parse_metric(found["metric"] or metrics[0])
    cell, rest = _cell(found["at"] or "", axes, text)
    if rest:
        metric = metric.at(dict(parse_metric(f"x@{','.join(rest)}").cell))
    sides = []
    for name in ("there", "other"):
        own, unknown = _cell(found[name] or "", axes, text)
        if unknown:
            known = ", ".join(axes) or "none"
            raise ValueError(
                f"expected an axis of the grid ({known}), got {unknown[0]!r} in {text!r}"
            )
        sides.append(tuple(own.items()))
    try:
        by = float(found["by"] or 0)
    except ValueError as error:
        raise ValueError(
            f"expected a number after `by`, got {found['by']!r} in {text!r}"
        ) from error
    above, right = found["sign"] == ">", _number(found["right"])
    cells = (tuple(cell.items()), *sides)
    return Prediction(text, metric, found["left"], above, right, by, *cells)


def _cell(
    words: str, axes: Mapping[str, Sequence[str]], text: str
) -> tuple[dict[str, str], list[str]]:
    """Return axis and label of ``KEY=VALUE, ...``, and the parts whose key is not an axis of the
    grid.
    """
    cell, rest = {}, []
    for part in words.split(",") if words else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in axes:
            rest.append(f"{key}={value}")
        elif value not in axes[key]:
            known = ", ".join(axes[key])
            raise ValueError(f"expected one of {known} for {key}, got {value!r} in {text!r}")
        else:
            cell[key] = value
    return cell, rest


def judge(
    prediction: Prediction,
    left: Sequence[Score],
    right: Sequence[Score],
    confidence: float,
    cell: str = "",
) -> Outcome:
    """Return whether a prediction holds.

    Args:
        prediction: the prediction.
        left: scores of its left side, one for each seed.
        right: scores of its right side, with the same seeds; not used if it is a number.
        confidence: confidence level of the interval.
        cell: label of the grid's cell.
    """
    if isinstance(prediction.right, float):
        other = prediction.right
        values = [score.value - other for score in left]
        sampling = _shifted(sampling_of(left), other)
    else:
        values = [a.value - b.value for a, b in zip(left, right, strict=True)]
        sampling = sampling_of_difference(left, right)
    mean, low, high, n = estimate(values, confidence, sampling)
    worst, best = (low, high) if prediction.above else (-high, -low)
    verdict: Verdict = "open"
    why = ""
    if n < FEWEST_PAIRS:
        why = f"{n} seed(s): a verdict requires {FEWEST_PAIRS}"
    elif low != low:  # nan
        why = "equal for all seeds, and no items: no interval"
    elif worst > prediction.by:
        verdict = "holds"
    elif best < prediction.by:
        verdict = "fails"
    else:
        why = f"the interval contains {prediction.by:g}"
    return Outcome(prediction.text, cell, mean, low, high, verdict, why)


def _shifted(sampling: Sampling, by: float) -> Sampling:
    return sampling._replace(low=sampling.low - by, high=sampling.high - by)


def _number(word: str) -> Any:
    """Return the word as a number if possible, else unchanged."""
    try:
        return float(word)
    except ValueError:
        return word
