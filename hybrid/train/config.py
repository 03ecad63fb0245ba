"""The training configuration: typed, with every mistake named before anything is computed."""

# ruff: noqa: RUF009  (`option` is `dataclasses.field` with a help text)

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from hybrid.config.options import ConfigError, build, option, type_problem
from hybrid.data.packing import LongDocuments, Packing
from hybrid.data.sources import SourceConfig, parse_source
from hybrid.train import yaml
from hybrid.train.limits import (
    MUON_RULES,
    RULES,
    decided,
    nearest,
    outside,
    unmeant,
    without_effect,
)
from hybrid.train.model import model_mistakes
from hybrid.train.schedule import MultiStepConfig

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda", "xpu", "mps", "npu"]

# Sizes beyond these are slips of the pen.
LARGEST = {"sequence_length": 1 << 28, "eval_rows": 1 << 28, "context_parallel": 1 << 16}

# Where we differ from the defaults of transformers.TrainingArguments, and why.
TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",  # a tracker is asked for by name
    "logging_steps": 10,  # the progress bar shows the loss
    "logging_nan_inf_filter": False,  # a loss that is not finite is news
    "ddp_find_unused_parameters": False,  # every step uses every parameter; else DDP says so
}


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024) for the matrices inside layers; AdamW keeps the rest.

    The rest: embeddings, the head, norms, gates, depthwise convolutions, experts (stacks of matrices).
    """

    learning_rate: float | None = option(None, help="null: training.learning_rate")
    momentum: float = option(0.95, help="of the momentum that is orthogonalised")
    nesterov: bool = option(True, help="look one step ahead")
    ns_steps: int = option(5, help="Newton-Schulz iterations")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = option(
        "match_rms_adamw",
        help="how the shape of a matrix scales its step (arXiv 2502.16982, eq. 4)",
    )


@dataclass(frozen=True)
class ProbeConfig:
    """Recall measured while a run trains: rows of a plug-in, and how many of their labels are met.

    Other keys beside these are the source's own, as in `data:`.
    """

    source: SourceConfig = option(help="a plug-in, e.g. needle or mqar; or any source of `data:`")
    every: int = option(
        100, help="optimizer steps between two probes; there is one at the end, too"
    )
    rows: int = option(64, help="rows of each length")
    lengths: list[int] | None = option(None, help="tokens of a row; null: sequence_length")
    depth_buckets: int = option(4, help="parts of a row in which what is asked for may stand")


@dataclass(frozen=True)
class TrainConfig:
    """What `hybrid.train.run` needs; the YAML file has the same keys."""

    model: dict[str, Any] = option(help="keys of HybridConfig; or model_type: NAME; or path: DIR")
    data: list[SourceConfig] = option(help="one source, or several with weights")
    sequence_length: int = option(help="tokens of a row")
    tokenizer: str = option("bytes", help="bytes, or a Hugging Face tokenizer by name or path")
    packing: Packing = option("concatenate", help="true: concatenate; false: none; or best_fit")
    long_documents: LongDocuments = option("split", help="documents longer than a row")
    eval_data: list[SourceConfig] = option(
        default_factory=list, help="rows of which the loss is taken every training.eval_steps"
    )
    eval_rows: int = option(64, help="rows of eval_data")
    probes: dict[str, ProbeConfig] = option(
        default_factory=dict, help="name -> what is probed every so many steps"
    )
    context_parallel: int = option(1, help="processes that share a row, each with a slice of it")
    device: Device = option("auto", help="auto: an accelerator where there is one, else the CPU")
    muon: MuonConfig | None = option(None, help="true, or options: Muon for matrices")
    multi_step: MultiStepConfig | None = option(
        None, help="true, or options: a rate that falls in steps, for training.lr_scheduler_type"
    )
    decay_embeddings: bool = option(False, help="weight decay on embeddings (OLMo 2 has none)")
    decay_norms: bool = option(False, help="weight decay on the weights of norms")
    decay_gates: bool = option(False, help="weight decay on gates, decays and what is like them")
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "any key of transformers.TrainingArguments"}
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `parse_config` reads again."""
        values = dataclasses.asdict(self)
        for key in ("data", "eval_data"):
            values[key] = [_source_as_dict(source) for source in getattr(self, key)]
        for name, probe in self.probes.items():
            values["probes"][name] |= _source_as_dict(probe.source)
        return values


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A YAML file, with `key=value` overrides, as a checked configuration.

    Args:
        path: the file. Its name gives the default `training.output_dir`, `runs/NAME`.
        overrides: e.g. `training.max_steps=10`, `data[0].weight=0.3`; values are YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.apply_overrides(yaml.read(path), overrides)
    training = values.setdefault("training", {})
    if isinstance(training, dict):
        training.setdefault("output_dir", str(Path("runs") / Path(path).stem))
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], title: str = "the config") -> TrainConfig:
    """Plain values as a checked configuration; the mistakes of all parts are reported together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    mistakes: list[str] = []
    values = dict(values)
    if isinstance(values.get("packing"), bool):
        values["packing"] = "concatenate" if values["packing"] else "none"
    for key in ("data", "eval_data"):
        if key in values:
            values[key] = _parse_sources(values[key], key, mistakes)
    if isinstance(values.get("probes"), dict):
        values["probes"] = _parse_probes(values["probes"], mistakes)
    values["muon"] = _parse_muon(values.get("muon"), mistakes)
    values["multi_step"] = _parse_multi_step(values, mistakes)
    if isinstance(values.get("training", {}), dict):
        values["training"] = _parse_training(values.get("training", {}), mistakes)
    if isinstance(values.get("model"), dict):
        mistakes += model_mistakes(values["model"])
    mistakes += _impossible(values)
    config = build(TrainConfig, values, "", mistakes)
    if mistakes or config is None:
        raise ConfigError(mistakes, title)
    return config


def _parse_sources(values: Any, key: str, mistakes: list[str]) -> list[Any]:
    entries = values if isinstance(values, list) else [values]
    paths = [f"{key}[{i}]" for i in range(len(entries))] if isinstance(values, list) else [key]
    parsed = [parse_source(v, path, mistakes) for v, path in zip(entries, paths, strict=True)]
    # one with a mistake, which is on the list by now, should not be complained of twice
    return [SourceConfig("stdlib") if source is None else source for source in parsed]


def _parse_probes(values: dict[str, Any], mistakes: list[str]) -> dict[str, ProbeConfig]:
    own = {f.name for f in dataclasses.fields(ProbeConfig)} - {"source"}
    parsed = {}
    for name, given in values.items():
        path = f"probes.{name}"
        if not isinstance(name, str) or not name.isidentifier() or name == "loss":
            mistakes.append(f"{path}: a name is a word of letters, digits and _, and not 'loss'")
        given = {"source": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping):
            mistakes.append(f"{path}: expected a source, found {type(given).__name__}")
            continue
        source = parse_source({k: v for k, v in given.items() if k not in own}, path, mistakes)
        numbers = {k: v for k, v in given.items() if k in own}
        probe = (
            build(ProbeConfig, {"source": source, **numbers}, path, mistakes) if source else None
        )
        if probe is not None:
            parsed[name] = probe
            counts = {
                "every": probe.every,
                "rows": probe.rows,
                "depth_buckets": probe.depth_buckets,
            }
            counts |= {f"lengths[{i}]": n for i, n in enumerate(probe.lengths or [])}
            mistakes += [
                f"{path}.{k}: expected at least 1, found {n}" for k, n in counts.items() if n < 1
            ]
    return parsed


def _switched(cls: type[T], value: Any, path: str, mistakes: list[str]) -> T | None:
    """Options that `true` turns on as they are."""
    if value is None or value is False:
        return None
    return build(cls, {} if value is True else value, path, mistakes)


def _parse_muon(value: Any, mistakes: list[str]) -> MuonConfig | None:
    found = _switched(MuonConfig, value, "muon", mistakes)
    if found is not None:
        mistakes += outside(dataclasses.asdict(found), MUON_RULES, "muon")
    return found


def _parse_multi_step(values: Mapping[str, Any], mistakes: list[str]) -> MultiStepConfig | None:
    given, training = values.get("multi_step"), values.get("training")
    found = _switched(MultiStepConfig, given, "multi_step", mistakes)
    if found is None:
        return None
    mistakes += found.mistakes("multi_step")
    if isinstance(training, Mapping) and "lr_scheduler_type" in training:
        mistakes.append("multi_step: takes the place of training.lr_scheduler_type; leave one out")
    return found


def _parse_training(values: dict[str, Any], mistakes: list[str]) -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    checked = dict(TRAINING_DEFAULTS)
    for key, value in values.items():
        if value is False and key.endswith("_strategy"):
            value = "no"  # which YAML reads as false
        if key not in known:
            mistakes.append(f"training.{key}: unknown key, {nearest(str(key), known)}")
        elif problem := type_problem(value, hints[key]):
            mistakes.append(f"training.{key}: {problem}")
        else:
            checked[key] = value
    beyond = outside(checked, RULES, "training")
    named = {line.split(":")[0] for line in beyond}
    rest = {key: value for key, value in checked.items() if f"training.{key}" not in named}
    mistakes += [*beyond, *unmeant(rest, "training"), *without_effect(checked)]
    mistakes += decided(checked, known)
    return checked


def _impossible(values: Mapping[str, Any]) -> list[str]:
    """Values of the right type that cannot be meant."""
    mistakes = []
    # a row of one token has nothing to predict
    for key, least in (("sequence_length", 2), ("eval_rows", 1), ("context_parallel", 1)):
        value = values.get(key)
        if type_problem(value, int) is None and value < least:
            mistakes.append(f"{key}: expected at least {least}, found {value}")
        if type_problem(value, int) is None and value > LARGEST[key]:
            mistakes.append(f"{key}: expected at most {LARGEST[key]}, found {value}")
    if values.get("data") == []:
        mistakes.append("data: no source; name at least one, e.g. {source: stdlib}")
    model = values.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    if path is not None and not Path(str(path)).is_dir():
        mistakes.append(f"model.path: there is no folder {str(path)!r}")
    return mistakes


def _source_as_dict(source: SourceConfig) -> dict[str, Any]:
    """Only what differs from the defaults, a plug-in's options laid beside `source`, as written."""
    defaults = SourceConfig(source.source)
    values = {
        f.name: getattr(source, f.name)
        for f in dataclasses.fields(SourceConfig)
        if getattr(source, f.name) != getattr(defaults, f.name)
    }
    options = values.pop("options", {})
    return {"source": source.source, **values, **options}
