"""Ablations with discipline: a baseline, changes to it, equal cost, several seeds, one report.

    hybrid ablate configs/ablations/....yaml [--dry-run]

load_ablation   a YAML file -> Ablation, every mistake named
plan_runs       Ablation -> Design: the variants, the widths that make them cost the same
run_design      trains what is not there yet, evaluates it; the same call again continues
summarise       what was measured -> a report: means, intervals, which changes are established
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.ablate.config import Ablation, Match, load_ablation
    from hybrid.ablate.design import Design, Variant, plan_runs
    from hybrid.ablate.report import markdown, summarise, write_report
    from hybrid.ablate.runs import run_design

# Light on purpose: `import hybrid.ablate` does not load transformers.
_HOMES = {
    "Ablation": "config",
    "Design": "design",
    "Match": "config",
    "Variant": "design",
    "load_ablation": "config",
    "markdown": "report",
    "plan_runs": "design",
    "run_design": "runs",
    "summarise": "report",
    "write_report": "report",
}

__all__ = [
    "Ablation",
    "Design",
    "Match",
    "Variant",
    "load_ablation",
    "markdown",
    "plan_runs",
    "run_design",
    "summarise",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
