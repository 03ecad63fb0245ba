"""The YAML of a search on a model: typed; all mistakes are reported before anything is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hybrid.ablate.evaluation import EvaluationTasks
from hybrid.ablate.metrics import parse_metric
from hybrid.config import yaml
from hybrid.config.declare import (
    Count,
    Declared,
    NotNegative,
    Positive,
    Seed,
    Size,
    Size0,
    Text,
    build,
    refuse,
)
from hybrid.config.options import ConfigError
from hybrid.distill.config import DistillConfig, Training
from hybrid.distill.config import parse_config as parse_distillation
from hybrid.layout import LayoutError, check_symbol

Method = Literal["importance", "supernet", "gates"]
Direction = Literal["backward", "forward"]
Ranking = Literal["kl", "recall"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", re.IGNORECASE)


def _parse_bytes(value: Any) -> Any:
    """Return the bytes of ``64MiB`` or ``64 MB``; other values stay."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError("a number of bytes, or a size such as 64MiB")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def _check_symbol(symbol: str) -> str:
    try:
        check_symbol(symbol)
    except LayoutError as error:
        raise ValueError("one letter, the symbol of a mixer") from error
    return symbol


def _no_twins(values: list[Any]) -> list[Any]:
    refuse([f": {v!r} is given twice" for v in sorted({v for v in values if values.count(v) > 1})])
    return values


Symbol = Annotated[str, AfterValidator(_check_symbol)]


class Budget(Declared):
    """What a layout may have: exactly one of both."""

    layers: Size | None = Field(None, description="number of searched layers that stay softmax")
    cache: Annotated[Count | None, BeforeValidator(_parse_bytes)] = Field(
        None, description="bytes of the cache of one sequence of `context` tokens, e.g. 64MiB"
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Budget:
        if (self.layers is None) == (self.cache is None):
            refuse([": expected exactly one of layers and cache"])
        return self


class ImportanceOptions(Declared):
    """Each softmax layer replaced alone; then greedy searches from both ends."""

    rank: Annotated[list[Ranking], AfterValidator(_no_twins)] = Field(
        ["kl", "recall"],
        description="measures of a layer: the divergence, and the recall lost, if there are metrics",
    )
    greedy: Annotated[list[Direction], AfterValidator(_no_twins)] = Field(
        ["backward", "forward"],
        description="backward: replace the least harmful layer, again and again; forward: from no"
        " softmax layer, restore the most useful one",
    )
    greedy_by: Ranking = Field("kl", description="measure of the greedy searches")
    shortlist: Size | None = Field(
        8,
        description="layers that a greedy step measures again, the best ones when they were last"
        " measured; null: all",
    )


class LearningOptions(Declared):
    """Training of the linear mixers together with a choice in every layer."""

    training: Training = Field(
        default_factory=dict, description="keys of TrainingArguments, over those of `distill`"
    )
    temperature: Positive = Field(1.0, description="that both logits are divided by")


class SupernetOptions(LearningOptions):
    """Every layer holds both mixers; each step draws one of them in every layer."""

    trials: Count = Field(64, description="placements that optuna measures, without training")
    startup: Size = Field(16, description="of them, drawn at random before the sampler learns")


class GatesOptions(LearningOptions):
    """Every layer mixes both outputs with a learnt gate, under a penalty on the budget."""

    penalty: NotNegative = Field(1.0, description="factor of the penalty, in nats per token")
    learning_rate: Positive = Field(0.1, description="of the gates")
    temperature_of_gates: Positive = Field(
        2 / 3, description="of the relaxed Bernoulli samples (arXiv 1712.01312, section 2.2)"
    )


class SearchFile(Declared):
    """The keys of the YAML file."""

    name: Text = Field(description="of the report; default: the name of the file")
    distill: dict[str, Any] = Field(
        description="a distillation config: its path, or its keys; its layout is what is searched for"
    )
    linear: Symbol = Field(description="symbol of the mixer that replaces softmax attention")
    budget: Budget = Field(description="of layers, or of cache bytes")
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(_no_twins)] = Field(
        ["importance"], description="of importance, supernet, gates"
    )
    layers: Annotated[list[Size0], AfterValidator(_no_twins)] | None = Field(
        None, description="softmax layers to choose from; null: all"
    )
    counts: Annotated[list[Size0], AfterValidator(_no_twins)] | None = Field(
        None,
        description="numbers of softmax layers to propose layouts for; null: the budget, and halves"
        " of it down to 0",
    )
    context: Count = Field(8192, description="tokens at which the cache is counted")
    rows: Size = Field(16, description="rows of eval_data for divergence and loss")
    metrics: Annotated[list[Text], AfterValidator(_no_twins)] = Field(
        default_factory=list, description="tasks of hybrid eval that measure retrieval"
    )
    evaluate: dict[str, Any] = Field(default_factory=dict, description="settings of the tasks")
    seed: Seed = Field(0, description="of drawn mixers and of optuna's sampler")
    importance: ImportanceOptions = Field(ImportanceOptions(), description="of the method")
    supernet: SupernetOptions = Field(SupernetOptions(), description="of the method")
    gates: GatesOptions = Field(GatesOptions(), description="of the method")
    out: Text = Field("", description="folder of all results; default: runs/search/NAME")

    def distillation(self, layout: str, folder: Path, stages: Mapping[str, Any]) -> DistillConfig:
        """Return a distillation into ``folder`` with these stages only.

        Raises:
            ConfigError: mistakes in ``distill``.
        """
        values = dict(self.distill)
        values |= {"outputs": None, "logits": None, "language": None, **stages}
        values |= {"layout": layout, "output_dir": str(folder), "knockout_rows": 0}
        values["eval_rows"] = self.rows
        return parse_distillation(values, "distill")

    def identity(self) -> dict[str, Any]:
        """Return what all scores of a folder have in common, as plain values."""
        keys = {"distill", "linear", "layers", "context", "rows", "metrics", "evaluate", "seed"}
        return self.model_dump(mode="json", include=keys)

    def learning(self, method: Method) -> dict[str, Any]:
        """Return what the training of ``supernet`` or ``gates`` depends on beside ``identity``."""
        values = getattr(self, method).model_dump(mode="json", exclude={"trials", "startup"})
        return {"budget": self.budget.model_dump(mode="json"), method: values}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchFile:
    """Read a YAML file, apply ``key=value`` overrides, and return the checked configuration.

    Args:
        path: the file. ``distill`` in it may be the path of a distillation config, from the working
            directory or beside the file.
        overrides: e.g. ``budget.layers=4``, ``distill.teacher.path=runs/mine``; values are YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    return parse_config(read_search(path, "distill", overrides), str(path))


def read_search(path: str | Path, included: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of a YAML file whose key ``included`` may name another file.

    The name of the search defaults to that of the file. See ``load_config`` for overrides.
    """
    values = yaml.read(path)
    if included in values:
        values[included] = yaml.read_included(values[included], path)
    values = yaml.apply_overrides(values, overrides)
    values.setdefault("name", Path(path).stem)
    return values


def parse_config(values: Mapping[str, Any], title: str = "the search") -> SearchFile:
    """Check plain values and return the configuration; report the mistakes of all parts together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values, mistakes = dict(values), []
    values.setdefault("out", f"runs/search/{values.get('name', '')}")
    found = build(SearchFile, values, "", mistakes)
    if found is None:
        raise ConfigError(mistakes, title)
    mistakes += [f"distill.{line}" for line in _distillation_problems(found)]
    mistakes += metric_problems(found.metrics, found.evaluate)
    if "recall" in (found.importance.greedy_by,) and not found.metrics:
        mistakes.append("importance.greedy_by: expected kl without metrics, got 'recall'")
    if mistakes:
        raise ConfigError(mistakes, title)
    return found


def _distillation_problems(config: SearchFile) -> list[str]:
    """Return the mistakes of the distillation and of the training of each method."""
    own = {k: config.distill[k] for k in ("outputs", "logits", "language") if k in config.distill}
    stages: list[dict[str, Any]] = [own] if any(own.values()) else []
    stages += [learning_stage(getattr(config, m)) for m in config.methods if m != "importance"]
    found: dict[str, None] = {}
    for stage in stages or [{"outputs": {}}]:
        try:
            config.distillation(config.linear, Path(config.out), stage)
        except ConfigError as error:
            found |= dict.fromkeys(error.mistakes)
    return list(found)


def learning_stage(options: LearningOptions) -> dict[str, Any]:
    """Return the stage of a distillation that trains with these options."""
    return {"logits": {"training": dict(options.training), "temperature": options.temperature}}


def metric_problems(metrics: Sequence[str], evaluate: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with metrics of retrieval, one line each."""
    tasks = EvaluationTasks()
    lines = tasks.problems(metrics, evaluate)
    if lines:
        return lines
    for name in metrics:
        if parse_metric(name).without is not None:
            lines.append(f"metrics: {name!r}: expected a task without a knock-out")
        elif not tasks.higher_is_better(name):
            lines.append(f"metrics: {name!r}: expected a task of which more is better")
    return lines
