"""Terminal output of an ablation: the plan and the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hybrid.ablate.design import Design, Variant
from hybrid.ablate.report import (
    EFFECT_HEADINGS,
    EXPECT_HEADINGS,
    SWEEP_HEADINGS,
    columns,
    effect_rows,
    expect_rows,
    sweep_rows,
)
from hybrid.ablate.runs import state
from hybrid.plan import human_bytes


def print_design(design: Design, console: Console) -> None:
    """Print every variant: changes, solved width, cost, and progress."""
    ablation = design.ablation
    match = ablation.match
    runs = sum(1 for _ in design.runs())
    table = Table(title=f"{ablation.name}: {runs} runs", box=SIMPLE_HEAD)
    width = [] if match is None else ["width"]
    table.add_column("variant", no_wrap=True)
    for heading in (*width, "difference", "parameters", "FLOPs", "cache", "seeds"):
        table.add_column(heading, justify="right")
    for variant in design.variants:
        solved = [] if match is None else ["-" if variant.width is None else f"{variant.width:,}"]
        table.add_row(variant.name, *solved, *_cost(variant), _progress(design, variant))
    console.print(table)
    if match is not None:
        console.print(f"width: {match.width}", highlight=False, soft_wrap=True)
    on = (
        "parameters, not matched"
        if match is None
        else f"{match.cost}, matched within {match.within:.1%}"
    )
    console.print(
        f"difference: of {on}; FLOPs: of a training token; cache: of one sequence of"
        f" {ablation.context:,} tokens; runs go to {design.out}",
        highlight=False,
        soft_wrap=True,
    )


def _cost(variant: Variant) -> list[str]:
    if variant.cost is None or variant.difference is None:
        return ["-"] * 4
    cost = variant.cost
    sizes = [_short(cost.parameters), _short(cost.flops_per_token), human_bytes(cost.cache_bytes)]
    return [f"{variant.difference:+.2%}", *sizes]


def _short(number: float) -> str:
    """Format 69812345 as '69.81M'; the report has all digits."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def _progress(design: Design, variant: Variant) -> str:
    tried = variant.trials or (variant,)
    folders = [folder for other, _, folder in design.runs() if other is variant or other in tried]
    done = sum(state(folder) == "trained already" for folder in folders)
    return f"{len(folders)}, {done} done" if done else str(len(folders))


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the two tables of the report: measurements, and effects of changes."""
    heads = columns(report)
    names = [variant["name"] for variant in report["variants"]]
    table = Table("", *names, title=report["name"])  # one column per variant, like ``hybrid eval``
    for head, _, cell in heads[1:]:
        table.add_row(head, *(cell(variant) for variant in report["variants"]))
    console.print(table)
    effects = Table(title="effect of each change", box=SIMPLE_HEAD)
    for heading in EFFECT_HEADINGS[1:]:  # the comparison includes the change
        effects.add_column(heading, no_wrap=heading == "verdict")
    for row in effect_rows(report):
        effects.add_row(*row[1:])
    console.print(effects)
    if report["sweeps"]:
        _print_rows(console, "sweep", SWEEP_HEADINGS, sweep_rows(report))
    if report["expectations"]:
        _print_rows(console, "predictions", EXPECT_HEADINGS, expect_rows(report))


def _print_rows(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(*headings, title=title, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
