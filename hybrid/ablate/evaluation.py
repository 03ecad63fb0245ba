"""Tasks of ``hybrid_eval`` as metrics of an ablation, and the HTML report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hybrid  # noqa: F401  (registers the model with transformers)
from hybrid.ablate import report as words
from hybrid.ablate.config import TRAINING_METRICS
from hybrid.ablate.metrics import parse_metric
from hybrid.config.options import did_you_mean
from hybrid_eval import Settings, evaluate
from hybrid_eval.cells import cell_score
from hybrid_eval.lm_harness import resolve
from hybrid_eval.registry import TASKS, check_options
from hybrid_eval.report import Page, render
from hybrid_eval.report_figures import Picture
from hybrid_eval.seeds import Score
from hybrid_eval.tables import Table


class EvaluationTasks:
    """Evaluator with the headline figures of the tasks of ``hybrid_eval`` and lm-eval."""

    def problems(self, metrics: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Return a line for each unknown task, setting or option."""
        lines = []
        for name in metrics:
            try:
                metric = parse_metric(name)
                if len(resolve(metric.task)) != 1:
                    task = metric.task
                    lines.append(f"metrics: expected one task, got the group {task!r}")
            except ValueError as error:
                near = did_you_mean(name, [*TRAINING_METRICS, *TASKS])
                hint = near if near.startswith("did") else str(error)
                lines.append(f"metrics: unknown metric {name!r}, {hint}")
                continue
            for key, values in (("length", "lengths"), ("depth", "depths")):
                asked, there = dict(metric.cell).get(key), options.get(values)
                if asked is not None and there and asked not in there:
                    lines.append(f"metrics: {name!r}: evaluate.{values} has no {asked:g}")
        known = self._settings()
        lines += [
            f"evaluate.{key}: unknown key, {did_you_mean(str(key), [*known, 'options'])}"
            for key in options
            if key not in (*known, "options")
        ]
        for name, values in (options.get("options") or {}).items():
            try:
                for task in resolve(name):
                    check_options(task, values)
            except ValueError as error:
                lines.append(f"evaluate.options: {error}")
        return lines

    def higher_is_better(self, metric: str) -> bool:
        """Return whether larger values of a metric are better, as declared by its task."""
        return resolve(parse_metric(metric).task)[0].higher_is_better

    def __call__(
        self, folder: Path, metrics: Sequence[str], options: Mapping[str, Any]
    ) -> dict[str, Score]:
        """Return the headline figure of each task on the checkpoint in ``folder``."""
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()
            if key != "options"
        }
        asked = {name: parse_metric(name) for name in metrics}
        gone = list(dict.fromkeys(m.without for m in asked.values() if m.without is not None))
        found = evaluate(
            str(folder),
            list(dict.fromkeys(metric.task for metric in asked.values())),
            settings=Settings(**settings),
            options=options.get("options"),
            ablate=gone,
        )
        results = {model["ablate"]: model["results"] for model in found["models"]}
        return {
            name: cell_score(results[metric.without][metric.task], dict(metric.cell))
            for name, metric in asked.items()
        }

    @staticmethod
    def _settings() -> list[str]:
        return [f.name for f in dataclasses.fields(Settings) if f.name != "corpus"]


def html(report: dict[str, Any], folder: Path) -> str:
    """Return the report of an ablation as a self-contained HTML page, in the style of ``hybrid
    eval``.
    """
    seeds = f"{report['confidence']:.0%} interval over seeds"
    notes = {"difference": seeds}
    caption = "Differences, paired by seed, with intervals: dark is established, grey is noise."
    pictures = [Picture("effects.png", caption, (folder / "effects.png").read_bytes())]
    if report.get("figure"):
        asked = report["figure"]
        shown = f"{asked['y']} against {asked['x']}; bars are {report['confidence']:.0%} intervals."
        pictures.insert(0, Picture("figure.png", shown, (folder / "figure.png").read_bytes()))
    page = Page(
        title=f"Ablation: {report['name']}",
        lead=[line for line in (report["finding"], report["paper"]) if line],
        tables=_tables(report),
        pictures=pictures,
        differences=words.effect_rows(report),
        compared=(
            "Effect of each change",
            [(head, notes.get(head, "")) for head in words.EFFECT_HEADINGS],
        ),
        notes=words.notes(report),
        footer=[(name, version) for name, version in report["versions"].items()],
    )
    return render(page)


def _tables(report: dict[str, Any]) -> list[Table]:
    """Return the tables of variants, predictions and sweeps; wide tables are split to fit a page."""
    columns = words.columns(report)
    cells = [[cell(variant) for _, _, cell in columns] for variant in report["variants"]]
    variants = Table("Variants", [(head, note) for head, note, _ in columns], cells)
    found = []
    for title, headings, rows in (
        ("Predictions", words.EXPECT_HEADINGS, words.expect_rows(report)),
        ("Sweep", words.SWEEP_HEADINGS, words.sweep_rows(report)),
    ):
        if rows:
            found.append(Table(title, [(heading, "") for heading in headings], rows))
    return [*found[:1], variants, *found[1:]]
