"""Pareto frontiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Point = TypeVar("Point", bound=Mapping[str, Any])


def on_frontier(points: Sequence[Point], directions: Mapping[str, str]) -> list[Point]:
    """Return the points that no other point dominates.

    A point dominates another if it is at least as good in every measure, and better in one.

    Args:
        points: each with a number for every measure.
        directions: measure -> "lower" or "higher", whichever is better.
    """
    signs = [(key, 1 if better == "lower" else -1) for key, better in directions.items()]
    costs = [tuple(sign * point[key] for key, sign in signs) for point in points]
    return [
        point
        for point, own in zip(points, costs, strict=True)
        if not any(_dominates(other, own) for other in costs)
    ]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
