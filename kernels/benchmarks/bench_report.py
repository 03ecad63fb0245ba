"""What ``bench.py`` found, against what was aimed at: rows, verdict, JSON and Markdown.

Shapes: T time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTIONS = ("forward", "forward+backward")
TARGET_LENGTH = 4096
GROWTH_LIMIT = 4.4
STEP_TARGET = 2.0

# Times faster than the other side, forward and forward+backward, and the part of its memory that
# both passes may take, at T = 4096.
TARGETS: dict[str, tuple[float, float, float | None]] = {
    "ssd": (9.0, 8.0, 1 / 8),
    "gated_delta": (2.5, 7.0, 1 / 4),
    "lightning": (2.2, 3.0, 1 / 2),
    "kda": (40.0, 130.0, 1 / 40),
    # Set against our own delta rule: at most 1.6 times its time.
    "erase": (0.625, 0.625, None),
    "gla": (2.0, 2.2, None),
    "mamba1": (5.0, 50.0, 1 / 4),
    "conv1d": (1.5, 1.5, 1 / 2),
}


@dataclass
class Result:
    """Figures of one op at one length; seconds of CPU, bytes, and shares of the GEMM peak.

    ``theirs`` and ``their_memory`` are None where the other side was left out.
    """

    op: str
    length: int
    direction: str
    ours: float
    theirs: float | None
    our_memory: int
    their_memory: int | None
    gemm_share: float | None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the other side."""
        return None if self.theirs is None else self.theirs / self.ours

    @property
    def memory_share(self) -> float | None:
        """The part of the other side's memory that ours takes; None where either has none."""
        return self.our_memory / self.their_memory if self.their_memory else None

    @property
    def ratio_target(self) -> float | None:
        """What ``ratio`` should reach."""
        if self.op.startswith("step_"):
            return STEP_TARGET
        if self.length != TARGET_LENGTH or self.op not in TARGETS:
            return None
        return TARGETS[self.op][DIRECTIONS.index(self.direction)]

    @property
    def memory_target(self) -> float | None:
        """What ``memory_share`` should not pass."""
        if self.length != TARGET_LENGTH or self.direction != DIRECTIONS[1]:
            return None
        return TARGETS[self.op][2] if self.op in TARGETS else None


@dataclass
class Growth:
    """Seconds of CPU of one op at two lengths."""

    op: str
    direction: str
    short_length: int
    long_length: int
    short: float
    long: float

    @property
    def ratio(self) -> float:
        """How many times longer the longer one takes."""
        return self.long / self.short


def heading() -> str:
    """Return the head of the table."""
    return (
        f"{'op':<17}{'T':>6} {'direction':<17}{'ours ms':>9}{'theirs ms':>11}{'faster':>8} "
        f"{'target':<14}{'ours MiB':>9}{'theirs MiB':>11}{'memory':>8} {'target':<14}"
        f"{'of GEMM peak':>12}"
    )


def row(r: Result) -> str:
    """Return one line of the table."""
    ours, theirs, ratio, ratio_target, our_memory, their_memory, share, share_target, gemm = cells(
        r
    )
    return (
        f"{r.op:<17}{r.length:>6} {r.direction:<17}{ours:>9}{theirs:>11}{ratio:>8} "
        f"{ratio_target:<14}{our_memory:>9}{their_memory:>11}{share:>8} {share_target:<14}{gemm:>12}"
    )


def cells(r: Result) -> tuple[str, ...]:
    """Return the figures of a result as text, "-" for what there is not."""
    small = r.op.startswith("step_")
    ratio, share = r.ratio, r.memory_share
    return (
        f"{r.ours * 1e3:.{4 if small else 2}f}",
        "-" if r.theirs is None else f"{r.theirs * 1e3:.{4 if small else 2}f}",
        "-" if ratio is None else f"{ratio:.1f}x",
        _judged(r.ratio_target, ratio, lambda x: f">= {x:g}", at_least=True),
        "-" if small else f"{r.our_memory / 2**20:.1f}",
        "-" if small or r.their_memory is None else f"{r.their_memory / 2**20:.1f}",
        "-" if small or not share else f"1/{1 / share:.1f}",
        _judged(r.memory_target, share, lambda x: f"<= 1/{1 / x:g}", at_least=False),
        "-" if r.gemm_share is None else f"{r.gemm_share:.0%}",
    )


def _judged(target: float | None, found: float | None, words, at_least: bool) -> str:
    if target is None:
        return "-"
    if found is None:
        return f"{words(target)} unknown"
    met = found >= target if at_least else found <= target
    return f"{words(target)} {'met' if met else 'MISSED'}"


def growth_row(g: Growth) -> str:
    """Return one line about how time grows."""
    judged = _judged(GROWTH_LIMIT, g.ratio, lambda x: f"<= {x:g}", at_least=False)
    return (
        f"{g.op:<17}{g.direction:<17} time({g.long_length}) / time({g.short_length}) = "
        f"{g.long * 1e3:.2f} / {g.short * 1e3:.2f} ms = {g.ratio:.2f}  {judged}"
    )


def verdict(results: list[Result], growth: list[Growth]) -> str:
    """Return how many targets are met, and which are not."""
    judged = []
    for r in results:
        if r.ratio_target is not None and r.ratio is not None:
            name = f"{r.op} {r.direction} {r.ratio:.2f}x of {r.ratio_target:g}x"
            judged.append((r.ratio >= r.ratio_target, name))
        if r.memory_target is not None and r.memory_share:
            name = f"{r.op} memory 1/{1 / r.memory_share:.1f} of 1/{1 / r.memory_target:g}"
            judged.append((r.memory_share <= r.memory_target, name))
    judged += [
        (g.ratio <= GROWTH_LIMIT, f"{g.op} {g.direction} growth {g.ratio:.2f} of {GROWTH_LIMIT:g}")
        for g in growth
    ]
    missed = [name for met, name in judged if not met]
    found = f"{len(judged) - len(missed)} of {len(judged)} targets met"
    return f"{found}; missed: {'; '.join(missed)}" if missed else found


def write_json(
    path: Path, run: dict[str, str], results: list[Result], growth: list[Growth]
) -> None:
    """Write the figures; ratios and targets are derived and stand beside them."""
    rows = [
        asdict(r)
        | {
            "ratio": r.ratio,
            "ratio_target": r.ratio_target,
            "memory_share": r.memory_share,
            "memory_target": r.memory_target,
        }
        for r in results
    ]
    grown = [asdict(g) | {"ratio": g.ratio, "limit": GROWTH_LIMIT} for g in growth]
    found = {"run": run, "results": rows, "growth": grown}
    path.write_text(json.dumps(found, indent=2) + "\n")


def write_markdown(
    path: Path, run: dict[str, str], results: list[Result], growth: list[Growth]
) -> None:
    """Write the table, with what was run on what."""
    lines = [
        "# CPU: measured",
        "",
        "Written by `python kernels/benchmarks/bench.py --markdown`; what is measured and how stands at",
        "the head of `kernels/benchmarks/bench.py`. One run of "
        + ", ".join(f"{name} {value}" for name, value in run.items())
        + ".",
        "",
        verdict(results, growth) + ".",
        "",
        "| op | T | direction | ours ms | theirs ms | faster | target | ours MiB | theirs MiB "
        "| memory | target | of GEMM peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join((r.op, str(r.length), r.direction, *cells(r)))} |" for r in results]
    if growth:
        lines += ["", "How time grows with T:", "", "```", *map(growth_row, growth), "```"]
    path.write_text("\n".join(lines) + "\n")
