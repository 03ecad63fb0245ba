"""Names of metrics: a task, one cell of it, and an optional knock-out.

mqar                                  the headline figure of a task
needle@length=256,depth=0.5           one cell of it
mqar without attention                of the model with its softmax layers zeroed (or: linear, 0,3)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_FORM = re.compile(r"(?P<task>[^\s@]+)(?:@(?P<cell>\S+))?(?:\s+without\s+(?P<without>\S+))?")


@dataclass(frozen=True)
class Metric:
    """The parsed name of a metric.

    Attributes:
        task: a task of ``hybrid_eval``, or ``loss`` or ``eval_loss``.
        cell: key and value pairs of a cell of the task; empty for the headline figure.
        without: the knock-out, as in ``hybrid eval --ablate``; None for none.
    """

    task: str
    cell: tuple[tuple[str, float], ...] = ()
    without: str | None = None

    @property
    def name(self) -> str:
        """Return the canonical name."""
        cell = ",".join(f"{key}={value:g}" for key, value in self.cell)
        return (
            self.task
            + (f"@{cell}" if cell else "")
            + (f" without {self.without}" if self.without else "")
        )

    def at(self, cell: Mapping[str, float]) -> Metric:
        """Return the metric at a cell, in addition to its own conditions."""
        return Metric(self.task, tuple({**dict(self.cell), **cell}.items()), self.without)


def parse_metric(text: str) -> Metric:
    """Parse the name of a metric.

    Raises:
        ValueError: the name is invalid.
    """
    found = _FORM.fullmatch(" ".join(text.split()))
    if found is None:
        raise ValueError(
            f"expected TASK, TASK@KEY=VALUE or TASK without attention|linear|LAYERS, got {text!r}"
        )
    cell: dict[str, float] = {}
    for part in (found["cell"] or "").split(",") if found["cell"] else ():
        key, equals, value = part.partition("=")
        try:
            cell[key] = float(value)
        except ValueError as error:
            raise ValueError(f"expected KEY=NUMBER after @, got {part!r} in {text!r}") from error
        if not (key and equals):
            raise ValueError(f"expected KEY=NUMBER after @, got {part!r} in {text!r}")
    return Metric(found["task"], tuple(cell.items()), found["without"])
