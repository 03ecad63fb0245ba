"""Search over layouts to train from scratch: short runs with successive halving.

Every trial of optuna is a layout. It is trained by ``hybrid ablate`` for the steps of the first rung,
then, unless it is pruned, anew for those of the next rung. A layout is pruned at a rung if it is not
among the best 1 / ``reduction`` of the layouts that reached it (asynchronous successive halving, Li et
al., arXiv 1810.05934).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import optuna
from optuna.trial import TrialState
from pydantic import AfterValidator, Field, model_validator

from hybrid.ablate.config import TRAINING_METRICS, Match, parse_ablation
from hybrid.ablate.design import Design, plan_runs
from hybrid.ablate.evaluation import EvaluationTasks
from hybrid.ablate.runs import Measured, run_design
from hybrid.config.declare import Count, Declared, Seed, Size, Size2, Text, build, refuse
from hybrid.config.options import ConfigError
from hybrid.layout import LayoutError, parse, resolve
from hybrid.locks import sole_writer
from hybrid.search import report
from hybrid.search.bench import IDENTITY, keep_identity
from hybrid.search.config import Symbol, metric_problems, read_search
from hybrid.search.supernet import finished, open_study
from hybrid.terminal import Interrupted

STUDY = "study.log"
LAYOUT = "model.layout"


def _rising(rungs: list[int]) -> list[int]:
    if rungs != sorted(set(rungs)):
        refuse([f": expected rising numbers of steps, got {rungs}"])
    return rungs


class ScratchFile(Declared):
    """The keys of the YAML file."""

    name: Text = Field(description="of the report; default: the name of the file")
    train: dict[str, Any] = Field(
        description="a training config: its path, or its keys; its layout is what is searched for"
    )
    softmax: Symbol = Field("S", description="symbol of the mixer that is limited")
    linear: Symbol = Field("L", description="symbol of the mixer of all other layers")
    layers: Size2 | None = Field(None, description="depth; null: that of `train.model`")
    max_softmax: Size = Field(description="largest number of softmax layers of a layout")
    layouts: Annotated[list[Text], Field(min_length=2)] | None = Field(
        None, description="layouts to choose from; null: all placements, searched by optuna"
    )
    rungs: Annotated[list[Count], Field(min_length=1), AfterValidator(_rising)] = Field(
        description="steps of the runs, rising"
    )
    reduction: Size2 = Field(2, description="one layout of so many goes on to the next rung")
    trials: Count = Field(16, description="layouts that are tried")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="of each layout")
    by: Text = Field("eval_loss", description="what decides: eval_loss, loss or a task")
    metrics: list[Text] = Field(
        default_factory=list, description="tasks of hybrid eval that measure retrieval"
    )
    evaluate: dict[str, Any] = Field(default_factory=dict, description="settings of the tasks")
    match: Match | None = Field(None, description="as in `hybrid ablate`: equal costs")
    context: Count = Field(8192, description="tokens at which the cache is counted")
    seed: Seed = Field(0, description="of optuna's sampler")
    out: Text = Field("", description="folder of all results; default: runs/search/NAME")

    @model_validator(mode="after")
    def _two_mixers(self) -> ScratchFile:
        if self.softmax == self.linear:
            refuse([f"linear: expected another symbol than that of softmax, got {self.linear!r}"])
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ScratchFile:
    """Read a YAML file, apply ``key=value`` overrides, and return the checked configuration.

    Raises:
        ConfigError: with one line for each mistake.
    """
    return parse_config(read_search(path, "train", overrides), str(path))


def parse_config(values: Mapping[str, Any], title: str = "the search") -> ScratchFile:
    """Check plain values and return the configuration; report the mistakes of all parts together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values, mistakes = dict(values), []
    values.setdefault("out", f"runs/search/{values.get('name', '')}")
    found = build(ScratchFile, values, "", mistakes)
    if found is not None:
        mistakes += metric_problems(found.metrics, found.evaluate)
        mistakes += _layout_problems(found)
    if found is None or mistakes:
        raise ConfigError(mistakes, title)
    try:
        plan_layout(found, _first_layout(found), found.rungs[0])
    except ConfigError as error:
        lines = [
            line.replace("baseline.", "train.", 1).replace("the baseline", "train", 1)
            for line in error.mistakes
        ]
        raise ConfigError(lines, title) from error
    return found


def _depth(config: ScratchFile) -> int | None:
    if config.layers is not None:
        return config.layers
    model = config.train.get("model")
    model = model if isinstance(model, Mapping) else {}
    if isinstance(model.get("num_hidden_layers"), int):
        return model["num_hidden_layers"]
    try:
        return len(parse(str(model["layout"])))
    except (KeyError, LayoutError):
        return None


def _layout_problems(config: ScratchFile) -> list[str]:
    depth = _depth(config)
    if depth is None:
        return [
            "layers: expected the depth, as train.model has neither num_hidden_layers nor layout"
        ]
    if config.max_softmax >= depth:
        return [f"max_softmax: expected less than the {depth} layers, got {config.max_softmax}"]
    lines = []
    for number, text in enumerate(config.layouts or ()):
        try:
            layers = resolve(parse(text), "", depth)
        except LayoutError as error:
            lines.append(f"layouts[{number}]: {error}")
            continue
        count = sum(config.softmax in layer.mixers for layer in layers)
        if count > config.max_softmax:
            lines.append(
                f"layouts[{number}]: expected at most {config.max_softmax} layers of {config.softmax},"
                f" got {count} in {text!r}"
            )
    return lines


def _first_layout(config: ScratchFile) -> str:
    if config.layouts is not None:
        return config.layouts[0]
    depth = _depth(config)
    assert depth is not None
    return str(parse(config.linear * depth))


def plan_layout(config: ScratchFile, layout: str, steps: int) -> Design:
    """Return the runs of one layout at one rung, by ``hybrid ablate``'s plan.

    Raises:
        ConfigError: the training config cannot be used.
    """
    training = {**(config.train.get("training") or {}), "max_steps": steps}
    base = _first_layout(config)
    model = {
        **(config.train.get("model") or {}),
        "layout": base,
        "num_hidden_layers": _depth(config),
    }
    changed = "layout"
    values = {
        "name": config.name,
        "baseline": {**config.train, "training": training, "model": model},
        "changes": {changed: {LAYOUT: layout}},
        "leave_one_out": False,
        "seeds": config.seeds,
        "metrics": list(dict.fromkeys([config.by, *config.metrics, *_losses(config)])),
        "evaluate": config.evaluate,
        "match": None if config.match is None else config.match.model_dump(),
        "context": config.context,
        "out": str(Path(config.out) / f"steps-{steps}"),
    }
    design = plan_runs(parse_ablation(values, EvaluationTasks()))
    (variant,) = [v for v in design.variants if v.base_name == changed]
    name = "".join(c if c.isalnum() else "_" for c in layout)
    return replace(design, variants=[replace(variant, name=name)], contrasts=[])


def _losses(config: ScratchFile) -> list[str]:
    return ["eval_loss"] if config.train.get("eval_data") else ["loss"]


def search_scratch(config: ScratchFile) -> dict[str, Any]:
    """Try layouts by short runs; the same call continues an interrupted search.

    ``config.out`` receives every run, and the report as ``hybrid.search.search`` writes it.

    Returns:
        The report, as ``report.json`` holds it.

    Raises:
        ConfigError: the folder holds another search.
        Interrupted: Ctrl-C; finished runs, and the checkpoint of the running one, are kept.
    """
    out = Path(config.out)
    with sole_writer(out):
        identity = config.model_dump(mode="json", exclude={"name", "out", "trials"})
        keep_identity(out / IDENTITY, identity)
        try:
            return _Halving(config).go()
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; the runs in {out} are kept: run the same command again to resume"
            ) from error


class _Halving:
    """One study: layouts, rungs and what was measured."""

    def __init__(self, config: ScratchFile) -> None:
        self.config, self.out = config, Path(config.out)
        self.tasks = EvaluationTasks()
        by = config.by
        self.higher = by not in TRAINING_METRICS and self.tasks.higher_is_better(by)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=config.reduction, min_early_stopping_rate=0
        )
        direction = "maximize" if self.higher else "minimize"
        self.study = open_study(self.out / STUDY, [direction], pruner=pruner)
        self.study.sampler = optuna.samplers.TPESampler(seed=config.seed + finished(self.study))

    def go(self) -> dict[str, Any]:
        """Run all trials and write the report."""
        for left in self.study.get_trials(states=[TrialState.RUNNING]):  # cut off
            if left.params:
                self._try(optuna.Trial(self.study, left._trial_id))
            else:
                self.study.tell(left.number, state=TrialState.FAIL)
        while finished(self.study) < self.config.trials:
            self._try(self.study.ask())
        return report.finish(self._report(), self.out)

    def _layout(self, trial: optuna.Trial) -> str:
        config = self.config
        if config.layouts is not None:
            return trial.suggest_categorical("layout", config.layouts)
        depth = _depth(config)
        assert depth is not None
        count = trial.suggest_int("softmax layers", 0, config.max_softmax)
        keys = [trial.suggest_float(f"layer {i}", 0.0, 1.0) for i in range(depth)]
        kept = sorted(range(depth), key=lambda i: (-keys[i], i))[:count]
        letters = [config.softmax if i in kept else config.linear for i in range(depth)]
        return str(parse("".join(letters)))

    def _try(self, trial: optuna.Trial) -> None:
        """Train a layout from rung to rung until it is pruned; a diverged one is pruned."""
        layout = self._layout(trial)
        trial.set_user_attr("layout", layout)
        reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        value = math.nan
        for rung, steps in enumerate(self.config.rungs):
            runs = self._train(layout, steps)
            trial.set_user_attr("rung", rung)
            if any(run.diverged for run in runs):
                self.study.tell(trial, state=TrialState.PRUNED)
                return
            value = _mean(runs, self.config.by)
            step = self.config.reduction**rung  # the pruner's resource grows by this factor
            if step not in reported:
                trial.report(value, step)
            last = rung == len(self.config.rungs) - 1
            if not last and trial.should_prune():
                self.study.tell(trial, state=TrialState.PRUNED)
                return
        self.study.tell(trial, value)

    def _train(self, layout: str, steps: int) -> list[Measured]:
        design = plan_layout(self.config, layout, steps)
        return run_design(
            design, self.tasks, report=lambda line: print(f"{steps} steps: {line}", file=sys.stderr)
        )

    def _report(self) -> dict[str, Any]:
        """Return the layouts that reached the last rung as points, and all trials as a table."""
        config, last = self.config, self.config.rungs[-1]
        loss = _losses(config)[0]
        trials = self.study.get_trials(deepcopy=False)
        best = {t.user_attrs["layout"]: t for t in trials if t.state == TrialState.COMPLETE}
        points = []
        for layout in best:
            runs = self._train(layout, last)
            variant = plan_layout(config, layout, last).variants[0]
            points.append(
                {
                    "layout": layout,
                    "softmax_layers": _count(layout, config),
                    "cache_bytes": None if variant.cost is None else variant.cost.cache_bytes,
                    "fits": True,
                    "loss": _mean(runs, loss),
                    **{metric: _mean(runs, metric) for metric in config.metrics},
                    "methods": ["successive halving"],
                    "command": ["hybrid", "train", str(Path(runs[0].folder) / "config.yaml")],
                }
            )
        rows = [_row(trial, config) for trial in trials if "rung" in trial.user_attrs]
        better = "higher" if self.higher else "lower"
        return {
            "name": config.name,
            "about": f"Layouts of {config.softmax} and {config.linear}, {_depth(config)} layers, trained"
            f" from scratch by successive halving: {', '.join(map(str, config.rungs))} steps.",
            "budget": f"at most {config.max_softmax} layers of {config.softmax}",
            "metrics": list(config.metrics),
            "context": config.context,
            "points": points,
            "tables": [
                (
                    "Trials",
                    f"The last rung of each layout, and {config.by} there ({better} is better).",
                    ["layout", "steps", config.by, "state"],
                    rows,
                )
            ],
            "footer": f"Every rung trains anew, with its own schedule. Seeds {config.seeds}: means.",
        }


def _count(layout: str, config: ScratchFile) -> int:
    depth = _depth(config)
    return sum(config.softmax in layer.mixers for layer in resolve(parse(layout), "", depth))


def _mean(runs: Sequence[Measured], metric: str) -> float:
    return math.fsum(run.metrics[metric] for run in runs) / len(runs)


def _row(trial: Any, config: ScratchFile) -> list[str]:
    rung, values = trial.user_attrs["rung"], trial.intermediate_values
    value = values.get(config.reduction**rung)
    shown = "diverged" if value is None else f"{value:.4f}"
    steps = config.rungs[rung]
    return [f"`{trial.user_attrs['layout']}`", f"{steps}", shown, trial.state.name.lower()]
