"""Configuration of an ablation: typed; all mistakes are reported before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field

from hybrid.ablate.expect import Prediction, parse_prediction
from hybrid.ablate.grid import axes_of
from hybrid.ablate.grid import problems as grid_problems
from hybrid.ablate.metrics import parse_metric
from hybrid.config import yaml
from hybrid.config.declare import Count, Declared, Seed, Share, Size, Text, build, refuse, show
from hybrid.config.options import ConfigError, did_you_mean
from hybrid.train.config import TrainConfig, parse_config
from hybrid_eval.seeds import Score

TRAINING_METRICS = ("loss", "eval_loss")  # measured by the run; lower is better
OWNED = ("training.output_dir", "training.seed")  # set for each run
WORD = re.compile(r"[A-Za-z0-9][\w.+-]*")  # names become folders
RESERVED = ("baseline", "all")
ALL_BUT = "all-but-"
MOST_SEEDS = 1000


class Evaluator(Protocol):
    """Interface of the evaluation of a checkpoint; ``hybrid ablate`` passes the tasks of
    ``hybrid_eval``.
    """

    def problems(self, metrics: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Return the mistakes in metrics and options, one line each."""
        ...

    def higher_is_better(self, metric: str) -> bool:
        """Return whether larger values of a metric are better."""
        ...

    def __call__(
        self, folder: Path, metrics: Sequence[str], options: Mapping[str, Any]
    ) -> Mapping[str, float | Score]:
        """Return every metric of the checkpoint in ``folder``; a ``Score`` includes its items."""
        ...


def _check_names(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    lines = []
    for name in changes:
        if not WORD.fullmatch(name):
            lines.append(f"{name}: expected a name of letters, digits and _.+-, got {name!r}")
        elif name in RESERVED or name.startswith(ALL_BUT):
            lines.append(f"{name}: expected another name, got one reserved for combined changes")
    refuse(lines)
    return changes


def _range(seeds: Any) -> Any:
    """Convert a number of seeds to the seeds from 0."""
    is_count = isinstance(seeds, int) and not isinstance(seeds, bool)
    return list(range(seeds)) if is_count and 0 <= seeds <= MOST_SEEDS else seeds


def _no_twins(values: list[Any]) -> list[Any]:
    refuse(
        [
            f": expected each value once, got {v!r} twice"
            for v in sorted({v for v in values if values.count(v) > 1})
        ]
    )
    return values


class Match(Declared):
    """The cost that all variants share, and the width that is solved for."""

    cost: Literal["parameters", "flops"] = Field(
        description="parameters, or training FLOPs per token at the training length"
    )
    width: str = Field(
        "model.hidden_size",
        pattern=r"^model\.",
        description="key of the solved width, e.g. model.feed_forwards.-.intermediate_size",
    )
    step: Size = Field(8, description="divisor of the width, e.g. the head dim")
    within: Share = Field(0.02, description="maximum remaining relative difference")


class Sweep(Declared):
    """A key whose best value is selected per variant, such as the learning rate."""

    key: str = Field("training.learning_rate", description="the swept key")
    values: Annotated[list[Any], Field(min_length=2), AfterValidator(_no_twins)] = Field(
        description="values, each trained with the first seed"
    )
    by: Text = Field("eval_loss", description="metric of the selection: eval_loss, loss or a task")


class FigureOptions(Declared):
    """A figure of a metric against an axis, with one line per variant."""

    x: Text = Field(
        description="an axis of the grid, a key of the metric's cells (length), or a cost: parameters,"
        " state_bytes, cache_bytes"
    )
    y: Text = Field(description="a metric, without the condition on x")


class Ablation(Declared):
    """A baseline and changes to it."""

    name: Text = Field(description="name of the report and, by default, of the folder of the runs")
    baseline: dict[str, Any] = Field(description="a training config: its path, or its keys")
    changes: Annotated[
        dict[str, Annotated[dict[str, Any], Field(min_length=1)]], AfterValidator(_check_names)
    ] = Field(
        default_factory=dict,
        description="name -> {key: value}; a mapping is merged into an existing mapping",
    )
    leave_one_out: bool = Field(True, description="also all changes together, and all but each")
    match: Match | None = Field(
        None, description="the cost that all variants share; null: no matching"
    )
    seeds: Annotated[
        list[Seed], Field(min_length=1), BeforeValidator(_range), AfterValidator(_no_twins)
    ] = Field(
        [0, 1, 2], description="seeds of initialisation and data for each variant; or their number"
    )
    metrics: Annotated[list[Text], AfterValidator(_no_twins)] = Field(
        default_factory=list,
        description="loss (mean of the last tenth of the log), eval_loss, and tasks of hybrid eval",
    )
    evaluate: dict[str, Any] = Field(default_factory=dict, description="settings of the tasks")
    grid: dict[str, Any] = Field(
        default_factory=dict,
        description="axis -> values, or labels with the keys that each sets; see ablate/grid.py",
    )
    sweep: Sweep | None = Field(None, description="a key whose best value is selected per variant")
    expect: list[Text] = Field(
        default_factory=list, description="predictions, see ablate/expect.py"
    )
    figure: FigureOptions | None = Field(
        None, description="a figure in addition to that of the effects"
    )
    finding: str = Field("", description="the finding, a sentence for the report")
    paper: str = Field("", description="source of the finding")
    context: Count = Field(8192, description="number of tokens for the size of the cache")
    confidence: float = Field(0.95, ge=0.5, lt=1, description="confidence level of the intervals")
    out: Text = Field("", description="folder of the runs and the report")


def load_ablation(
    path: str | Path,
    overrides: Sequence[str] = (),
    evaluator: Evaluator | None = None,
    scale: str | None = None,
) -> Ablation:
    """Read a YAML file, apply ``key=value`` overrides, and return the checked ablation.

    Args:
        path: the file; its keys ``baseline`` and ``overrides`` define the baseline.
        overrides: e.g. ``seeds=[0,1]``, ``baseline.training.max_steps=10``. Those of the baseline
            also replace what the file's ``overrides`` set.
        evaluator: evaluates metrics other than those of training.
        scale: one of the file's ``scales``, a mapping of keys to set; None for no change.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.read(path)
    scales = values.pop("scales", None) or {}
    values["baseline"] = yaml.read_included(values.get("baseline"), path)
    if scale is not None:
        values = _scaled(values, scales, scale, str(path))
    values = _with_command_line(values, overrides)
    values.setdefault("name", Path(path).stem)
    return parse_ablation(values, evaluator, str(path))


def _with_command_line(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key=value`` overrides; those of ``baseline`` follow the file's own ``overrides``."""
    later = [text for text in overrides if text.startswith("baseline.")]
    if not later:
        return yaml.apply_overrides(values, overrides)
    yaml.apply_overrides(values, overrides)  # reports the mistakes of all of them together
    values = yaml.apply_overrides(values, [text for text in overrides if text not in later])
    own, mistakes = values.get("overrides"), []
    if isinstance(own, Mapping) and isinstance(values["baseline"], Mapping):
        made = with_overrides(values["baseline"], own, "overrides", mistakes)
        if not mistakes:  # otherwise ``parse_ablation`` reports them
            values = {**values, "baseline": made, "overrides": None}
    return yaml.apply_overrides(values, later)


def _scaled(values: dict[str, Any], scales: Any, scale: str, title: str) -> dict[str, Any]:
    """Return the values with the keys of a scale; a mapping replaces an existing mapping."""
    if not isinstance(scales, Mapping) or scale not in scales:
        known = ", ".join(scales) or "none"
        raise ConfigError([f"scales: expected one of {known}, got {scale!r}"], title)
    for key, value in scales[scale].items():
        try:
            values = yaml.with_key(values, key, value)
        except LookupError as error:
            raise ConfigError([f"scales.{scale}.{key}: {error.args[0]}"], title) from error
    return values


def parse_ablation(
    values: Mapping[str, Any], evaluator: Evaluator | None = None, title: str = "the ablation"
) -> Ablation:
    """Check plain values and return the ablation; report the mistakes of all parts together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    mistakes: list[str] = []
    values = dict(values)
    more = values.pop("overrides", None)
    more = {} if more is None else more
    if isinstance(values.get("baseline"), dict) and isinstance(more, dict):
        values["baseline"] = with_overrides(values["baseline"], more, "overrides", mistakes)
        _check_run(values["baseline"], "baseline", mistakes)
    elif not isinstance(more, dict):
        mistakes.append(f"overrides: expected mapping, got {show(more)}")
    values.setdefault("out", f"runs/ablations/{values.get('name', '')}")
    if not values.get("changes") and not values.get("expect"):
        mistakes.append("changes: expected at least 1 entry, got {}")
    found = build(Ablation, values, "", mistakes)
    form = grid_problems(values.get("grid"))
    mistakes += _change_problems(values) + form
    if found is None or form:
        raise ConfigError(mistakes + _metric_problems(values, evaluator), title)
    if not found.metrics:
        measured = TRAINING_METRICS if found.baseline.get("eval_data") else ("loss",)
        found = found.model_copy(update={"metrics": list(measured)})
    metrics = [*map(_canonical, found.metrics), *_foretold(found, mistakes)]
    found = found.model_copy(update={"metrics": list(dict.fromkeys(metrics))})
    swept = [found.sweep.by] if found.sweep is not None else []
    measured = list(dict.fromkeys([*found.metrics, *swept]))
    mistakes += _metric_problems({**values, "metrics": measured}, evaluator)
    if mistakes:
        raise ConfigError(mistakes, title)
    return found


def _canonical(name: str) -> str:
    """Return the canonical name of a metric; invalid names are returned unchanged."""
    try:
        return parse_metric(name).name
    except ValueError:
        return name


def predictions(ablation: Ablation) -> list[Prediction]:
    """Return the predictions of an ablation.

    Raises:
        ValueError: an invalid prediction; ``parse_ablation`` has refused these already.
    """
    axes = axes_of(ablation.grid)
    return [parse_prediction(text, ablation.metrics, axes) for text in ablation.expect]


def _foretold(ablation: Ablation, mistakes: list[str]) -> list[str]:
    """Return the metrics of the predictions; append mistakes in predictions to ``mistakes``."""
    known = [*RESERVED, *ablation.changes, *(ALL_BUT + name for name in ablation.changes)]
    axes, found = axes_of(ablation.grid), []
    for number, text in enumerate(ablation.expect):
        try:
            prediction = parse_prediction(text, ablation.metrics, axes)
        except ValueError as error:
            mistakes.append(f"expect[{number}]: {error}")
            continue
        found.append(prediction.metric.name)
        for name in (prediction.left, prediction.right):
            if isinstance(name, str) and name not in known:
                mistakes.append(
                    f"expect[{number}]: unknown variant {name!r}, {did_you_mean(name, known)}"
                )
    return found


def with_overrides(
    values: Mapping[str, Any], overrides: Mapping[str, Any], where: str, mistakes: list[str]
) -> dict[str, Any]:
    """Return a copy of ``values`` with keys set by path; a mapping is merged into a mapping."""
    made = dict(values)
    for path, value in overrides.items():
        present = present_at(made, path)
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            value = with_overrides(present, value, f"{where}.{path}", mistakes)
        try:
            made = yaml.with_key(made, str(path), value)
        except LookupError as error:
            mistakes.append(f"{where}.{path}: {error.args[0]}")
    return made


def present_at(values: Any, path: str) -> Any:
    """Return the value at ``a.b.c`` of nested mappings, or None."""
    for key in str(path).split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def flat(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return path -> value of a nested mapping; ``{a: {b: 1}}`` equals ``{a.b: 1}``. Keep empty
    mappings.
    """
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{rest}": v for rest, v in flat(value).items()}
        else:
            found[str(key)] = value
    return found


def train_config(values: Mapping[str, Any], where: str, mistakes: list[str]) -> TrainConfig | None:
    """Return the training configuration of a variant, or None after appending to ``mistakes``."""
    try:
        return parse_config(values)
    except ConfigError as error:
        mistakes += [f"{where}{line}" for line in error.mistakes]
    return None


def _check_run(values: dict[str, Any], where: str, mistakes: list[str]) -> None:
    training = values.get("training")
    if isinstance(training, dict):
        training.pop("output_dir", None)
    config = train_config(values, f"{where}.", mistakes)
    if config is not None and "path" in config.model:
        mistakes.append(
            f"{where}.model.path: expected none, since runs train from scratch with different seeds,"
            " got a path; try the keys of the model"
        )


def _change_problems(values: Mapping[str, Any]) -> list[str]:
    """Return mistakes: invalid training configurations, and keys that are set for each run."""
    baseline, changes, match = (values.get(key) for key in ("baseline", "changes", "match"))
    if not isinstance(baseline, Mapping) or not isinstance(changes, Mapping):
        return []
    width = None
    if isinstance(match, Mapping):
        width = match.get("width", Match.model_fields["width"].default)
    before: list[str] = []
    train_config(baseline, "", before)
    lines: list[str] = []
    for name, change in changes.items():
        if not isinstance(change, Mapping):
            continue
        where = f"changes.{name}."
        for key in flat(change):
            if key in OWNED:
                lines.append(
                    f"{where}{key}: expected none, since each run sets it; try `seeds`, `out`"
                )
            if key == width:
                lines.append(f"{where}{key}: expected none, since `match` solves for this width")
        mistakes: list[str] = []
        train_config(with_overrides(baseline, change, "", mistakes), "", mistakes)
        # mistakes of the baseline are reported already
        lines += [f"{where}{line}" for line in mistakes if line not in before]
    return lines


def _metric_problems(values: Mapping[str, Any], evaluator: Evaluator | None) -> list[str]:
    metrics, options = values.get("metrics", []), values.get("evaluate", {})
    if not isinstance(metrics, list) or not isinstance(options, Mapping):
        return []
    metrics = [m for m in dict.fromkeys(map(str, metrics)) if m]
    lines = []
    others = [m for m in metrics if m not in TRAINING_METRICS]
    baseline = values.get("baseline")
    if "eval_loss" in metrics and isinstance(baseline, Mapping) and not baseline.get("eval_data"):
        lines.append("metrics: expected eval_data in the baseline for 'eval_loss', got none")
    if evaluator is not None:
        return lines + evaluator.problems(others, options)
    return lines + [
        f"metrics: unknown metric {m!r}, {did_you_mean(m, TRAINING_METRICS)}" for m in others
    ]
