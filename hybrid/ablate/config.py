"""The YAML of an ablation: typed, every mistake named before anything is computed."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hybrid.ablate.statistics import Score
from hybrid.config.options import ConfigError, build, did_you_mean, option
from hybrid.train import yaml
from hybrid.train.config import TrainConfig, parse_config

TRAINING_METRICS = ("loss", "eval_loss")  # what a run measures by itself; both are better lower
OWNED = ("training.output_dir", "training.seed")  # each run's own
WORD = re.compile(r"[A-Za-z0-9][\w.+-]*")  # names become folders
RESERVED = ("baseline", "all")
ALL_BUT = "all-but-"


class Evaluator(Protocol):
    """What measures a trained checkpoint; `hybrid ablate` hands in `hybrid_eval`'s tasks."""

    def problems(self, metrics: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """What is wrong with the metrics asked for or with the options, a line each."""
        ...

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric."""
        ...

    def __call__(
        self, folder: Path, metrics: Sequence[str], options: Mapping[str, Any]
    ) -> Mapping[str, float | Score]:
        """Every metric of the checkpoint in `folder`; a `Score` names its items, too."""
        ...


@dataclass(frozen=True)
class Match:
    """What every variant has to cost the same in, and the width that is solved for."""

    cost: Literal["parameters", "flops"] = option(
        help="parameters, or training FLOPs a token at the training length"
    )
    width: str = option(
        "model.hidden_size",
        help="the key that is solved for, e.g. model.feed_forwards.-.intermediate_size",
    )
    step: int = option(8, help="the width is a multiple of this, e.g. of the head size")
    within: float = option(0.02, help="the largest difference that may remain, as a share")


@dataclass(frozen=True)
class Ablation:
    """A baseline and changes to it.

    Attributes:
        name: of the report and, by default, of the folder under `runs/ablations/`.
        baseline: a training configuration, as plain values.
        changes: name -> {path of a key: value}, e.g. `{"model.layout": "SSSS"}`; a mapping as value is
            merged into the one that is there.
        leave_one_out: run all changes together too, and all but each.
        match: None for variants that cost what they cost.
        seeds: of initialisation and data; every variant is trained with each.
        metrics: `loss` (mean of the last tenth of the log), `eval_loss`, and those of the evaluator.
        evaluate: options of the evaluator.
        context: tokens at which the cache's size is stated.
        confidence: of the intervals.
        out: folder of the runs and the report.
    """

    name: str
    baseline: dict[str, Any] = option(help="a training config: its path, or its keys")
    changes: dict[str, dict[str, Any]] = option(help="name -> {key: value}")
    leave_one_out: bool = option(True, help="also all changes together, and all but each")
    match: Match | None = option(None, help="what the variants have to cost the same in")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metrics: list[str] = field(default_factory=list)
    evaluate: dict[str, Any] = field(default_factory=dict)
    context: int = option(8192, help="tokens at which the cache's size is stated")
    confidence: float = option(0.95, help="of the intervals")
    out: str = option("", help="folder of the runs and the report")


def load_ablation(
    path: str | Path,
    overrides: Sequence[str] = (),
    evaluator: Evaluator | None = None,
) -> Ablation:
    """A YAML file, with `key=value` overrides, as a checked ablation.

    Args:
        path: the file; `baseline` and `overrides` in it make up the baseline.
        overrides: e.g. `seeds=[0,1]`, `baseline.training.max_steps=10`.
        evaluator: what answers for metrics beside those of training.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.read(path)
    values["baseline"] = _read_baseline(values, Path(path))
    yaml.apply_overrides(values, overrides)
    values.setdefault("name", Path(path).stem)
    return parse_ablation(values, evaluator, str(path))


def parse_ablation(
    values: Mapping[str, Any], evaluator: Evaluator | None = None, title: str = "the ablation"
) -> Ablation:
    """Plain values as a checked ablation; the mistakes of all parts are reported together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    mistakes: list[str] = []
    values = dict(values)
    more = values.pop("overrides", None) or {}
    if isinstance(values.get("baseline"), dict) and isinstance(more, dict):
        values["baseline"] = with_overrides(values["baseline"], more, "overrides", mistakes)
        _check_run(values["baseline"], "baseline", mistakes)
    elif more and not isinstance(more, dict):
        mistakes.append(f"overrides: expected a mapping of keys, found {type(more).__name__}")
    if isinstance(values.get("match"), dict):
        values["match"] = _parse_match(values["match"], mistakes)
    if isinstance(values.get("seeds"), int) and not isinstance(values["seeds"], bool):
        values["seeds"] = list(range(values["seeds"]))
    values.setdefault("out", f"runs/ablations/{values.get('name', '')}")
    found = build(Ablation, values, "", mistakes)
    if found is not None:
        mistakes += _problems(found, evaluator)
    if mistakes or found is None:
        raise ConfigError(mistakes, title)
    if not found.metrics:
        measured = TRAINING_METRICS if found.baseline.get("eval_data") else ("loss",)
        found = dataclasses.replace(found, metrics=list(measured))
    return found


def with_overrides(
    values: Mapping[str, Any], overrides: Mapping[str, Any], where: str, mistakes: list[str]
) -> dict[str, Any]:
    """A copy of `values` with keys set by their paths; a mapping is merged into a mapping."""
    made = copy.deepcopy(dict(values))
    for path, value in overrides.items():
        present = present_at(made, path)
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            value = with_overrides(present, value, f"{where}.{path}", mistakes)
        try:
            yaml.set_key(made, str(path), copy.deepcopy(value))
        except LookupError as error:
            mistakes.append(f"{where}.{path}: {error.args[0]}")
    return made


def present_at(values: Any, path: str) -> Any:
    """What stands at `a.b.c` of nested mappings; None where nothing does."""
    for key in str(path).split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value of a nested mapping; `{a: {b: 1}}` and `{a.b: 1}` are one. Empty ones stay."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{rest}": v for rest, v in flat(value).items()}
        else:
            found[str(key)] = value
    return found


def train_config(values: Mapping[str, Any], where: str, mistakes: list[str]) -> TrainConfig | None:
    """The training configuration of a variant, or None; mistakes are appended with their place."""
    try:
        return parse_config(values)
    except ConfigError as error:
        mistakes += [f"{where}: {line}" for line in error.mistakes]
    return None


def _read_baseline(values: dict[str, Any], path: Path) -> Any:
    """The baseline's keys; a path is looked for from here, and beside the ablation's file."""
    given = values.get("baseline")
    if not isinstance(given, str):
        return given
    places = [Path(given), path.parent / given]
    return yaml.read(next((place for place in places if place.is_file()), places[0]))


def _check_run(values: dict[str, Any], where: str, mistakes: list[str]) -> None:
    training = values.get("training")
    if isinstance(training, dict):
        training.pop("output_dir", None)
    config = train_config(values, where, mistakes)
    if config is not None and "path" in config.model:
        mistakes.append(
            f"{where}.model.path: an ablation trains from scratch, so that seeds differ; give the"
            " model's keys instead"
        )


def _parse_match(values: dict[str, Any], mistakes: list[str]) -> Match | None:
    match = build(Match, values, "match", mistakes)
    if match is None:
        return None
    if match.step < 1:
        mistakes.append(f"match.step: expected at least 1, found {match.step}")
    if not 0 < match.within < 1:
        mistakes.append(f"match.within: expected a share between 0 and 1, found {match.within}")
    if not match.width.startswith("model."):
        mistakes.append(f"match.width: expected a key of the model, found {match.width!r}")
    return match


def _problems(ablation: Ablation, evaluator: Evaluator | None) -> list[str]:
    """What is wrong with keys of the right type."""
    lines = _change_problems(ablation)
    seeds = ablation.seeds
    lines += [f"seeds: {s} is given twice" for s in sorted(set(seeds)) if seeds.count(s) > 1]
    lines += [f"seeds: expected 0 or more, found {s}" for s in seeds if s < 0]
    if not seeds:
        lines.append("seeds: none given; name at least one, better three")
    if ablation.context < 1:
        lines.append(f"context: expected at least 1 token, found {ablation.context}")
    if not 0.5 <= ablation.confidence < 1:
        found = ablation.confidence
        lines.append(f"confidence: expected from 0.5 to below 1, e.g. 0.95; found {found}")
    return lines + _metric_problems(ablation, evaluator)


def _change_problems(ablation: Ablation) -> list[str]:
    lines: list[str] = []
    before: list[str] = []
    train_config(ablation.baseline, "", before)
    if not ablation.changes:
        lines.append("changes: none given; an ablation needs at least one, {name: {key: value}}")
    for name, change in ablation.changes.items():
        where = f"changes.{name}"
        if not isinstance(name, str) or not WORD.fullmatch(name):
            lines.append(f"{where}: a name is a word of letters, digits and _.+-")
        elif name in RESERVED or name.startswith(ALL_BUT):
            lines.append(
                f"{where}: this name is ours, for a run of several changes; choose another"
            )
        if not isinstance(change, dict):
            lines.append(f"{where}: expected {{key: value}}, found {type(change).__name__}")
            continue
        given = flat(change)
        for key in given:
            if key in OWNED:
                lines.append(f"{where}.{key}: every run has its own; use `seeds` and `out`")
            if ablation.match is not None and key == ablation.match.width:
                lines.append(f"{where}.{key}: this is the width that `match` solves for")
        mistakes: list[str] = []
        train_config(with_overrides(ablation.baseline, change, "", mistakes), "", mistakes)
        # those of the baseline are on the list already
        lines += [f"{where}{line}" for line in mistakes if line not in before]
    return lines


def _metric_problems(ablation: Ablation, evaluator: Evaluator | None) -> list[str]:
    lines = [f"metrics: {m!r} is given twice" for m in _twice(ablation.metrics)]
    others = [m for m in ablation.metrics if m not in TRAINING_METRICS]
    if "eval_loss" in ablation.metrics and not ablation.baseline.get("eval_data"):
        lines.append("metrics: 'eval_loss' needs eval_data in the baseline")
    if evaluator is not None:
        return lines + evaluator.problems(others, ablation.evaluate)
    return lines + [
        f"metrics: unknown metric {m!r}, {did_you_mean(m, TRAINING_METRICS)}" for m in others
    ]


def _twice(words: Sequence[str]) -> list[str]:
    return sorted({word for word in words if words.count(word) > 1})
