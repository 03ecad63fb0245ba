"""Report of an ablation: means, intervals, and which changes are established."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrid.ablate.config import TRAINING_METRICS, Evaluator
from hybrid.ablate.design import Design, Variant
from hybrid.ablate.outcomes import figure_points, outcomes, sweeps
from hybrid.ablate.runs import Measured
from hybrid.files import write_bytes, write_json, write_text
from hybrid.plan import human_bytes
from hybrid_eval.seeds import (
    FEWEST_PAIRS,
    estimate,
    p_value,
    sampling_of,
    sampling_of_difference,
)
from hybrid_eval.stats import holm

Record = dict[str, Any]


def summarise(
    design: Design, measured: Sequence[Measured], evaluator: Evaluator | None = None
) -> Record:
    """Return the report as plain values; numbers that are missing or not finite are None.

    A change is established on a metric if there are at least three pairs of seeds, the interval of
    its difference excludes 0, and its p value, with Holm's correction over the changes (for each
    metric and each kind of comparison), is below 1 - confidence. Otherwise it is noise: these seeds
    and evaluation items cannot distinguish it from chance.
    """
    ablation = design.ablation
    every, measured = measured, [run for run in measured if run.kept]
    directions = {
        m: "lower"
        if m in TRAINING_METRICS or evaluator is None or not evaluator.higher_is_better(m)
        else "higher"
        for m in ablation.metrics
    }
    report = {
        "name": ablation.name,
        "seeds": list(ablation.seeds),
        "confidence": ablation.confidence,
        "context": ablation.context,
        "sequence_length": design.variants[0].config.sequence_length,
        "match": None if ablation.match is None else ablation.match.model_dump(),
        "evaluate": ablation.evaluate,
        "metrics": directions,
        "versions": _versions(),
        "variants": [_variant(v, measured, ablation) for v in design.variants],
        "effects": _effects(design, measured, directions),
        "finding": ablation.finding,
        "paper": ablation.paper,
        "expectations": [dataclasses.asdict(found) for found in outcomes(design, measured)],
        "sweeps": sweeps(design, every),
    }
    report = plain(report)
    if ablation.figure is not None:
        lines = figure_points(report, design)
        report["figure"] = {"x": ablation.figure.x, "y": ablation.figure.y, "lines": lines}
    return report


def _variant(variant: Variant, measured: Sequence[Measured], ablation: Any) -> Record:
    runs = [run for run in measured if run.variant == variant.name]
    ended = [run for run in runs if run.diverged is None]
    metrics = {}
    for name in ablation.metrics:
        values = {str(run.seed): run.metrics[name] for run in ended}
        sampling = sampling_of([run.score(name) for run in ended])
        found = estimate(list(values.values()), ablation.confidence, sampling)
        metrics[name] = {**found._asdict(), "values": values}
    return {
        "name": variant.name,
        "cell": dict(variant.cell.labels),
        "changes": list(variant.changes),
        "layout": variant.config.model.get("layout"),
        "width": variant.width,
        "difference": variant.difference,
        "cost": None if variant.cost is None else dataclasses.asdict(variant.cost),
        "tokens_per_second": estimate([r.tokens_per_second for r in ended], 0.95).mean,
        "seconds": estimate([r.seconds for r in ended], 0.95).mean,
        "diverged": {str(run.seed): run.diverged for run in runs if run.diverged is not None},
        "metrics": metrics,
    }


def _effects(
    design: Design, measured: Sequence[Measured], directions: dict[str, str]
) -> list[Record]:
    found = {(run.variant, run.seed): run for run in measured if run.diverged is None}
    effects = []
    for metric, better in directions.items():
        for kind in dict.fromkeys(c.kind for c in design.contrasts):
            family = []
            for contrast in (c for c in design.contrasts if c.kind == kind):
                seeds = [
                    seed
                    for seed in design.ablation.seeds
                    if {(contrast.changed, seed), (contrast.unchanged, seed)} <= found.keys()
                ]
                changed, unchanged = (
                    [found[name, seed].score(metric) for seed in seeds]
                    for name in (contrast.changed, contrast.unchanged)
                )
                differences = [a.value - b.value for a, b in zip(changed, unchanged, strict=True)]
                pairs = dict(zip(map(str, seeds), differences, strict=True))
                sampling = sampling_of_difference(changed, unchanged)
                ends = estimate(differences, design.ablation.confidence, sampling)
                shown = {**dataclasses.asdict(contrast), "metric": metric, **ends._asdict()}
                family.append({**shown, "p": p_value(differences, sampling), "pairs": pairs})
            corrected = holm([effect["p"] for effect in family])
            for effect, p in zip(family, corrected, strict=True):
                level = 1 - design.ablation.confidence
                effects.append(
                    {
                        **effect,
                        "p_holm": p,
                        "verdict": verdict({**effect, "p_holm": p}, better, level),
                    }
                )
    return effects


def verdict(effect: Record, better: str, level: float) -> str:
    """Return ``better`` or ``worse`` if the change is established, else ``noise`` or why there is
    no verdict.
    """
    if effect["n"] < 2:
        return "no pair of seeds" if effect["n"] == 0 else "one pair of seeds: no interval"
    if effect["n"] < FEWEST_PAIRS:
        return f"{effect['n']} pairs of seeds: a verdict requires {FEWEST_PAIRS}"
    if effect["p"] == 1 or effect["low"] <= 0 <= effect["high"]:
        return "noise"
    if math.isnan(effect["p"]):
        return "equal for all seeds: no interval"
    if not effect["p_holm"] < level:
        return "noise"
    return "better" if (effect["mean"] < 0) == (better == "lower") else "worse"


def plain(value: Any) -> Any:
    """Convert a value for JSON: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    names = ("hybrid-language-models", "torch", "transformers")
    return {name: metadata.version(name) for name in names}


# The report as text


def columns(report: Record) -> list[tuple[str, str, Callable[[Record], str]]]:
    """Return heading, note and cell function of each column of the table of variants."""
    match = report["match"]
    share = "parameters" if match is None else match["cost"]
    found: list[tuple[str, str, Callable[[Record], str]]] = [("variant", "", lambda r: r["name"])]
    if match is not None:
        found.append((match["width"], "solved for", lambda r: _or_dash(r["width"], "{:,}")))
    found += [
        (f"{share} relative to the baseline", "", lambda r: _or_dash(r["difference"], "{:+.2%}")),
        ("parameters", "", _cost("parameters", "{:,}".format)),
        ("training FLOPs per token", "", _cost("flops_per_token", "{:.4g}".format)),
        (f"cache at {report['context']:,}", "per sequence", _cost("cache_bytes", human_bytes)),
        ("tokens/s", "mean", lambda r: _or_dash(r["tokens_per_second"], "{:,.0f}")),
        ("seconds", "per run", lambda r: _or_dash(r["seconds"], "{:,.1f}")),
    ]
    note = f"{report['confidence']:.0%} interval over seeds"
    for metric in report["metrics"]:
        found.append((metric, note, lambda r, m=metric: interval(r["metrics"][m])))
    return found


def interval(found: Record, sign: str = "") -> str:
    """Format ``mean [low, high]``, or the part of it that is known."""
    if found["mean"] is None:
        return "diverged"
    number = f"{{:{sign}.4g}}"
    mean = number.format(found["mean"])
    if found["low"] is None:
        return f"{mean} ({'one seed' if found['n'] == 1 else 'no spread over seeds'})"
    return f"{mean} [{number.format(found['low'])}, {number.format(found['high'])}]"


def effect_rows(report: Record) -> list[list[str]]:
    """Return change, comparison, metric, difference, p, corrected p and verdict of each effect."""
    rows = []
    for e in report["effects"]:
        compared = f"{e['changed']} - {e['unchanged']}"
        said = e["verdict"]
        established = e["verdict"] in ("better", "worse")
        said = f"established: {e['verdict']}" if established else e["verdict"]
        shown = [interval(e, "+"), _p(e["p"]), _p(e["p_holm"]), said]
        rows.append([e["change"], compared, e["metric"], *shown])
    return rows


EFFECT_HEADINGS = ("change", "compared", "metric", "difference", "p", "p (Holm)", "verdict")


EXPECT_HEADINGS = ("prediction", "cell", "difference", "verdict")


def expect_rows(report: Record) -> list[list[str]]:
    """Return prediction, cell of the grid, difference with its interval, and verdict."""
    return [
        [
            e["text"],
            e["cell"] or "-",
            interval({**e, "n": len(report["seeds"])}, "+"),
            e["verdict"] + (f": {e['why']}" if e["why"] else ""),
        ]
        for e in report["expectations"]
    ]


SWEEP_HEADINGS = ("variant", "swept", "scores of the first seed", "chosen")


def sweep_rows(report: Record) -> list[list[str]]:
    """Return variant, key, score of every value, and the selected value."""
    return [
        [
            s["variant"],
            s["key"],
            ", ".join(
                f"{value}: {_or_dash(score, '{:.4g}')}" for value, score in s["scores"].items()
            )
            + f" ({s['by']})",
            str(s["chosen"]),
        ]
        for s in report["sweeps"]
    ]


def notes(report: Record) -> list[str]:
    """Return notes on how to read the figures."""
    seeds, confidence = report["seeds"], report["confidence"]
    lines = [
        f"Seeds: {', '.join(map(str, seeds))}. Intervals: Student's t, {confidence:.0%}, over seeds."
        " Differences are paired by seed: one seed, the same data order. If an evaluation reports its"
        " items, the interval also accounts for the choice of items, which all seeds share.",
        f"Established: at least {FEWEST_PAIRS} pairs of seeds, the interval of the difference excludes"
        " 0, and p, with Holm's correction over the changes (for each metric and kind of comparison,"
        f" not over metrics), is below {1 - confidence:.2g}. Noise: these seeds and items cannot"
        " distinguish the change from chance, which does not show that it has no effect. Values that"
        " are equal for all seeds, without items, have no interval.",
        "A change alone is compared with the baseline; leave-one-out compares all changes together"
        " with all but that one.",
    ]
    if report["match"] is None:
        lines.append("Costs were not matched.")
    else:
        m = report["match"]
        lines.append(
            f"Matched on {m['cost']} by {m['width']} in steps of {m['step']}, within"
            f" {m['within']:.1%}."
        )
    lines += [
        f"Metric {m}: {better} is better."
        + (" The mean of the last tenth of the training log." if m == "loss" else "")
        for m, better in report["metrics"].items()
    ]
    if report["expectations"]:
        lines.append(
            "A prediction holds if the whole interval of its difference agrees with it, and fails if no"
            f" part of it does; otherwise, or with fewer than {FEWEST_PAIRS} seeds, it is open."
        )
    for variant in report["variants"]:
        for seed, reason in variant["diverged"].items():
            lines.append(f"{variant['name']}, seed {seed}, diverged: {reason}")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [*lines, f"Versions: {versions}."]


def markdown(report: Record) -> str:
    """Return the report in Markdown."""
    heads = columns(report)
    table = [[cell(v) for _, _, cell in heads] for v in report["variants"]]
    titles = [f"{head} ({note})" if note else head for head, note, _ in heads]
    parts = [f"# Ablation: {report['name']}"]
    if report["finding"]:
        parts.append(
            " ".join(filter(None, [report["finding"], report["paper"] and f"({report['paper']})"]))
        )
    if report["expectations"]:
        parts += ["## Predictions", _table(EXPECT_HEADINGS, expect_rows(report))]
    parts += ["## Variants", _table(titles, table)]
    if report["sweeps"]:
        parts += ["## Sweep", _table(SWEEP_HEADINGS, sweep_rows(report))]
    parts.append("## Effect of each change")
    parts += [_table(EFFECT_HEADINGS, effect_rows(report)), "## How to read this"]
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    return "\n\n".join(parts) + "\n"


def write_report(report: Record, folder: str | Path) -> Path:
    """Write report.md, report.json and effects.png; return the path of report.md."""
    from hybrid.ablate.picture import curve, forest

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report, allow_nan=False)
    write_bytes(folder / "effects.png", forest(report))
    text = markdown(report) + "\n![Effects with their intervals](effects.png)\n"
    if report.get("figure"):
        write_bytes(folder / "figure.png", curve(report))
        text += "\n![The figure](figure.png)\n"
    write_text(folder / "report.md", text)
    return folder / "report.md"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cost(key: str, words: Callable[[Any], str]) -> Callable[[Record], str]:
    return lambda record: "-" if record["cost"] is None else words(record["cost"][key])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
