"""Write the report of a distillation: ``report.json``, and tables in ``report.md``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid.files import write_json, write_text

JSON, MARKDOWN = "report.json", "report.md"

LABELS = {
    "teacher": "teacher",
    "student": "student, not distilled",
    "outputs": "after stage 1, outputs",
    "logits": "after stage 2, logits",
    "language": "after stage 3, language modelling",
}


def recovered(losses: Mapping[str, float], name: str) -> float | None:
    """Return the recovered share of the loss gap between the undistilled student and the teacher."""
    gap = losses["student"] - losses["teacher"]
    return None if gap <= 0 else (losses["student"] - losses[name]) / gap


def write(report: Mapping[str, Any], folder: Path) -> Path:
    """Write both files; return the second."""
    write_json(folder / JSON, report)
    write_text(folder / MARKDOWN, markdown(report))
    return folder / MARKDOWN


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as text with tables."""
    head = [
        f"# {report['teacher']}: layout {report['teacher_layout']} to {report['layout']}",
        f"Held-out loss on {report['eval_rows']} rows of {report['sequence_length']} tokens, in nats"
        " per token; seconds are training time.",
    ]
    parts = [*head, _losses(report)]
    if report.get("output_errors"):
        parts += [
            "Relative squared error of the output of each new mixer, on the teacher's inputs.",
            _errors(report["output_errors"]),
        ]
    if report.get("knock_outs"):
        parts += [_knock_out_words(report), _knock_outs(report["knock_outs"])]
    return "\n\n".join(parts) + "\n"


def _losses(report: Mapping[str, Any]) -> str:
    losses, seconds = report["losses"], report["seconds"]
    rows = []
    for name, label in LABELS.items():
        if name in losses:
            share = recovered(losses, name)
            took = f"{seconds[name]:.0f}" if name in seconds else ""
            rows.append(
                [label, f"{losses[name]:.3f}", "" if share is None else f"{share:.1%}", took]
            )
    return _table(["", "loss", "recovered share of the gap", "seconds"], rows)


def _errors(errors: Mapping[str, Mapping[str, float]]) -> str:
    names = list(errors)
    rows = [
        [layer, *(f"{errors[name][layer]:.3f}" for name in names)] for layer in errors[names[0]]
    ]
    return _table(["layer", *(LABELS[name] for name in names)], rows)


def _knock_out_words(report: Mapping[str, Any]) -> str:
    idle = [b["name"] for b in report["knock_outs"] if b["idle"]]
    found = (
        f"Without a significant increase, hence idle: {', '.join(idle)}."
        if idle
        else "No branch is idle."
    )
    return (
        f"Knock-outs: the loss on {report['knockout_rows']} rows with the output of a mixer set to"
        f" zero, with standard errors over rows. {found}"
    )


def _knock_outs(branches: list[dict[str, Any]]) -> str:
    rows = [
        [
            b["name"],
            b["mixer"],
            "new" if b["replaced"] else "kept",
            f"{b['loss']:.3f}",
            _with_error(b["increase"], b["standard_error"]),
            "idle" if b["idle"] else "",
        ]
        for b in branches
    ]
    return _table(["branch", "mixer", "", "loss without", "increase", ""], rows)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:+.4f}" if error is None else f"{value:+.4f} +- {error:.4f}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
