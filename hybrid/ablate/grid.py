"""Grids: every variant of an ablation with every combination of the axes' values.

    grid:
      model.hidden_size: [64, 128]                      a key and its values
      pairs:                                            or labels, and the keys that each sets
        "16": {data.pairs: 16, evaluate.options.mqar.pairs: 16}
        "64": {data.pairs: 64, evaluate.options.mqar.pairs: 64}

Keys that begin with ``evaluate.`` change the evaluation, all others the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

EVALUATE = "evaluate."


@dataclass(frozen=True)
class Cell:
    """One cell: a label for each axis, and the keys that it sets.

    Attributes:
        labels: axis and label.
        overrides: keys of the training configuration.
        evaluate: keys of the evaluation settings.
    """

    labels: tuple[tuple[str, str], ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the cell, e.g. ``hidden_size=64,pairs=16``; empty without a grid."""
        return ",".join(f"{short(axis)}={label}" for axis, label in self.labels)


def short(axis: str) -> str:
    """Return the short name of an axis: ``model.hidden_size`` -> ``hidden_size``."""
    return axis.rpartition(".")[2]


def options_of(axis: str, values: Any) -> dict[str, Mapping[str, Any]]:
    """Return label -> keys that it sets, of one axis in either form."""
    if isinstance(values, Mapping):
        return {str(label): keys for label, keys in values.items()}
    return {str(value): {axis: value} for value in values}


def axes_of(grid: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the labels of every axis, by its short name."""
    return {short(axis): list(options_of(axis, values)) for axis, values in grid.items()}


def cells(grid: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield every combination of labels; one empty cell without a grid."""
    axes = [(axis, options_of(axis, values)) for axis, values in grid.items()]
    for chosen in product(*(options.items() for _, options in axes)):
        keys: dict[str, Any] = {}
        for _, own in chosen:
            keys |= own
        labels = tuple((axis, label) for (axis, _), (label, _) in zip(axes, chosen, strict=True))
        yield Cell(
            labels,
            {key: value for key, value in keys.items() if not key.startswith(EVALUATE)},
            {
                key.removeprefix(EVALUATE): value
                for key, value in keys.items()
                if key.startswith(EVALUATE)
            },
        )


def problems(grid: Any) -> list[str]:
    """Return the mistakes in the form of a grid, one line each."""
    lines = []
    for axis, values in grid.items() if isinstance(grid, Mapping) else ():
        if not isinstance(values, list | Mapping) or not values:
            lines.append(
                f"grid.{axis}: expected a list of values, or labels with keys; got {values!r}"
            )
            continue
        if isinstance(values, Mapping):
            lines += [
                f"grid.{axis}.{label}: expected {{key: value}}, got {keys!r}"
                for label, keys in values.items()
                if not isinstance(keys, Mapping) or not keys
            ]
    shorts = [short(axis) for axis in grid] if isinstance(grid, Mapping) else []
    lines += [
        f"grid: expected different names of axes, got {s!r} twice"
        for s in sorted({s for s in shorts if shorts.count(s) > 1})
    ]
    return lines
