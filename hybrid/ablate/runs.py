"""The runs of an ablation: each has its own folder, can be resumed, and is trained once.

OUT/VARIANT/seed-S/config.yaml         the training config, as for ``python -m hybrid.train``
OUT/VARIANT/seed-S/train_result.json   exists if the training is complete
OUT/VARIANT/seed-S/diverged.json       exists if its loss was not finite
OUT/VARIANT/seed-S/metrics.json        the measured metrics
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hybrid.ablate.config import TRAINING_METRICS, Ablation, Evaluator
from hybrid.ablate.design import Design, Variant
from hybrid.config.changes import changes
from hybrid.config.options import ConfigError
from hybrid.files import write_text
from hybrid.locks import sole_writer
from hybrid.train.config import parse_config
from hybrid.train.launch import training_command
from hybrid.train.runner import DIVERGED, RESULT, run
from hybrid_eval.seeds import Score

CONFIG, METRICS = "config.yaml", "metrics.json"
LAST = 0.1  # fraction of the log that the final loss is the mean of

# Trains from a config file, like ``python -m hybrid.train``.
Launcher = Callable[[Path], None]


@dataclass(frozen=True)
class Measured:
    """One run and its results.

    Attributes:
        variant, seed, folder: the run.
        metrics: name -> value; empty if the run diverged.
        tokens_per_second: speed of the training.
        seconds: time of the whole training at that speed.
        diverged: reason of a divergence; None otherwise.
        scores: scores of the metrics with known items.
        value: value of the swept key; None without a sweep.
        kept: whether the run belongs to the variant; False for a trial that was not selected.
    """

    variant: str
    seed: int
    folder: str
    metrics: dict[str, float]
    tokens_per_second: float
    seconds: float
    diverged: str | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    value: Any = None
    kept: bool = True

    def score(self, metric: str) -> Score:
        """Return a metric with its items, if known."""
        return self.scores.get(metric) or Score(self.metrics[metric])


def train_here(path: Path) -> None:
    """Train in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of file writing; training has its own
    run(parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path)))


def train_by(engine: str) -> Launcher:
    """Return a launcher that trains by ``accelerate launch --config_file ENGINE``."""

    def launch(path: Path) -> None:
        status = subprocess.call(training_command(path, engine=["--config_file", engine]))
        if status and not (path.parent / DIVERGED).is_file():
            raise ValueError(
                f"{path}: expected exit status 0 of the training, got {status}; see above"
            )

    return launch


def run_design(
    design: Design,
    evaluator: Evaluator | None = None,
    launch: Launcher = train_here,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> list[Measured]:
    """Train and measure every incomplete run; the same call resumes.

    Args:
        design: the runs.
        evaluator: evaluates metrics other than those of training.
        launch: trains from a config file, in the folder of that file.
        report: called with one line for each run.

    Raises:
        ConfigError: a folder holds a run of another configuration.
    """
    with sole_writer(design.out):
        return _run_design(design, evaluator, launch, report)


def _run_design(
    design: Design,
    evaluator: Evaluator | None,
    launch: Launcher,
    report: Callable[[str], None],
) -> list[Measured]:
    refuse_other_runs(design)
    total = sum(1 for _ in design.runs())
    done = 0

    def one(variant: Variant, seed: int, metrics: Sequence[str]) -> Measured:
        nonlocal done
        done += 1
        folder = design.folder(variant, seed)
        name = f"[{done}/{total}] {variant.name} seed {seed}"
        report(f"{name}: {state(folder)}")
        _train(run_values(variant, seed, folder), folder, launch)
        found = _measure(metrics, variant, seed, folder, evaluator)
        report(f"{name}: {_words(found)}")
        return found

    ablation = design.ablation
    measured: list[Measured] = []
    chosen = {variant.name: variant for variant in design.variants}
    for number, seed in enumerate(ablation.seeds):
        for variant in design.variants:
            if number == 0 and variant.trials:
                tried = [one(trial, seed, [_chooser(ablation)]) for trial in variant.trials]
                best = _best(tried, _chooser(ablation), evaluator)
                chosen[variant.name] = variant.trials[best]
                others = [run for place, run in enumerate(tried) if place != best]
                measured += [replace(r, variant=variant.name, kept=False) for r in others]
                total += 1  # the selected trial is measured with all metrics
            chooser = [_chooser(ablation)] if number == 0 and variant.trials else []
            metrics = list(dict.fromkeys([*ablation.metrics, *chooser]))
            found = one(chosen[variant.name], seed, metrics)
            measured.append(replace(found, variant=variant.name))
    return measured


def _chooser(ablation: Ablation) -> str:
    assert ablation.sweep is not None
    return ablation.sweep.by


def _best(tried: Sequence[Measured], by: str, evaluator: Evaluator | None) -> int:
    """Return the index of the best trial; a diverged one is the worst."""
    larger = by not in TRAINING_METRICS and evaluator is not None and evaluator.higher_is_better(by)
    worst = -math.inf if larger else math.inf
    values = [run.metrics.get(by, worst) for run in tried]
    return values.index(max(values) if larger else min(values))


def state(folder: Path) -> str:
    """Return the state of a run: complete, to be resumed, or new."""
    if (folder / RESULT).is_file() or (folder / DIVERGED).is_file():
        return "trained already"
    return "continuing" if any(folder.glob("checkpoint-*")) else "training"


def run_values(variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """Return the training configuration of one run, as plain values."""
    own = {"seed": seed, "output_dir": str(folder)}
    config = variant.config.model_copy(update={"training": variant.config.training | own})
    return config.as_dict()


def refuse_other_runs(design: Design) -> None:
    """Compare the runs in the folders with the plan.

    Raises:
        ConfigError: they differ; one line for each run and key.
    """
    lines = []
    for variant, seed, folder in design.every_run():
        path = folder / CONFIG
        if not path.is_file():
            continue
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        planned = run_values(variant, seed, folder)
        before["training"]["output_dir"] = planned["training"]["output_dir"]
        lines += [f"{folder}: {line}" for line in changes(before, planned)]
    if lines:
        raise ConfigError(
            lines,
            f"{design.out} has runs of another ablation (try another `out`, or remove those"
            " folders); it",
        )


def _train(values: dict[str, Any], folder: Path, launch: Launcher) -> None:
    """Train unless the folder has a result or a divergence."""
    if (folder / RESULT).is_file() or (folder / DIVERGED).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))
    with contextlib.suppress(FloatingPointError):  # recorded in a file by the trainer
        launch(folder / CONFIG)


def _measure(
    metrics: Sequence[str], variant: Variant, seed: int, folder: Path, evaluator: Evaluator | None
) -> Measured:
    if (folder / DIVERGED).is_file():
        reason = json.loads((folder / DIVERGED).read_text(encoding="utf-8"))["reason"]
        return Measured(
            variant.name, seed, str(folder), {}, math.nan, math.nan, reason, value=variant.value
        )
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    scores = {"loss": Score(_tail(result["losses"]))}
    if result["eval_losses"]:
        scores["eval_loss"] = Score(result["eval_losses"][-1][1])
    others = [m for m in metrics if m not in TRAINING_METRICS]
    if others and evaluator is not None:
        scores |= _evaluated(variant.evaluate, folder, others, evaluator)
    kept = {
        "evaluate": dict(variant.evaluate),
        "metrics": {name: score.value for name, score in scores.items()},
        "scores": {name: score._asdict() for name, score in scores.items()},
    }
    write_text(folder / METRICS, json.dumps(kept))
    speed = result["tokens_per_second"]
    # a resumed run has only the time of its last part
    whole = result["steps"] * result["tokens"] / max(1, result["steps"] - result["resumed_from"])
    return Measured(
        variant.name,
        seed,
        str(folder),
        {name: scores[name].value for name in metrics},
        speed,
        whole / speed if speed else math.nan,
        scores={name: scores[name] for name in metrics},
        value=variant.value,
    )


def _evaluated(
    options: Mapping[str, Any], folder: Path, names: list[str], evaluator: Evaluator
) -> dict[str, Score]:
    """Return the evaluator's metrics; those measured before with the same options are reused."""
    kept: dict[str, Score] = {}
    path = folder / METRICS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["evaluate"] == json.loads(json.dumps(dict(options))):
            scores = before.get("scores", {})
            kept = {name: _score(Score(**scores[name])) for name in names if name in scores}
    absent = [name for name in names if name not in kept]
    found = evaluator(folder, absent, options) if absent else {}
    return kept | {name: _score(value) for name, value in found.items()}


def _score(found: float | Score) -> Score:
    if not isinstance(found, Score):
        return Score(float(found))
    return found._replace(items=tuple(map(float, found.items)))


def _tail(losses: list[tuple[int, float]]) -> float:
    """Return the mean of the last tenth of the logged losses, at least one."""
    last = [loss for _, loss in losses[-max(1, round(LAST * len(losses))) :]]
    return math.fsum(last) / len(last)


def _words(found: Measured) -> str:
    if found.diverged is not None:
        return f"diverged: {found.diverged}"
    return ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
