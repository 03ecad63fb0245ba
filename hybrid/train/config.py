"""The training configuration: typed; all mistakes are reported before training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hybrid.config import yaml
from hybrid.config.declare import Below1, Count, Declared, NotNegative, Text, parse, refuse
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError
from hybrid.data.packing import LongDocuments, Packing
from hybrid.data.sources import Source, SourceConfig
from hybrid.train.limits import USUAL_NAMES, training_hints, training_values
from hybrid.train.model_values import check_model
from hybrid.train.schedule import MultiStepConfig

Device = Literal["auto", "cpu", "cuda", "xpu", "mps", "npu"]

# Differences from the defaults of transformers.TrainingArguments, with the reasons.
TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",  # trackers are opt-in
    "logging_steps": 10,  # the progress bar shows the loss
    "logging_nan_inf_filter": False,  # report losses that are not finite
    "ddp_find_unused_parameters": False,  # every step uses every parameter; otherwise DDP reports it
}


def _as_list(values: Any) -> Any:
    return values if isinstance(values, list) else [values]


def _switched(values: Any) -> Any:
    """Replace ``true`` by default options and ``false`` by None."""
    return {True: {}, False: None}[values] if isinstance(values, bool) else values


def _packing(value: Any) -> Any:
    return {True: "concatenate", False: "none"}[value] if isinstance(value, bool) else value


def _check_model(model: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_model(model)
    except ConfigError as error:
        refuse([line.removeprefix("model").removeprefix(".") for line in error.mistakes])
        raise


def _check_name(name: str) -> str:
    if not name.isidentifier() or name == "loss":
        raise ValueError("name of letters, digits and _, except 'loss'")
    return name


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_list)]


class MuonConfig(Declared):
    """Muon (Jordan et al. 2024) for the matrices inside layers; AdamW updates all other parameters.

    AdamW updates embeddings, the head, norms, gates, depthwise convolutions, and experts (3-d
    weights).
    """

    learning_rate: NotNegative | None = Field(None, description="null: training.learning_rate")
    momentum: Below1 = Field(0.95, description="factor of the momentum before orthogonalisation")
    nesterov: bool = Field(True, description="Nesterov momentum")
    ns_steps: int = Field(5, ge=1, lt=100, description="Newton-Schulz iterations")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        "match_rms_adamw",
        description="scaling of the step by the shape of a matrix (arXiv 2502.16982, eq. 4)",
    )


class ProbeConfig(Source):
    """A probe: recall measured during training, on the labels of a plug-in's rows.

    The other keys are those of a source, as in ``data:``.
    """

    every: Count = Field(
        100, description="optimizer steps between two probes; the last step is also probed"
    )
    rows: Count = Field(64, description="number of rows per length")
    lengths: Annotated[list[Count], Field(min_length=1)] | None = Field(
        None, description="tokens of a row; null: sequence_length"
    )
    depth_buckets: Count = Field(
        4, description="number of equal parts of a row, for accuracy by depth"
    )


class RowsConfig(Declared):
    """The data of a run, and its device."""

    data: Annotated[Sources, Field(min_length=1)] = Field(
        description="one source, or several with weights"
    )
    # a row of one token has nothing to predict
    sequence_length: int = Field(ge=2, le=1 << 28, description="tokens per row")
    packing: Annotated[Packing, BeforeValidator(_packing)] = Field(
        "concatenate", description="true: concatenate; false: none; or best_fit"
    )
    long_documents: LongDocuments = Field(
        "split", description="handling of documents longer than a row"
    )
    eval_data: Sources = Field(
        default_factory=list,
        description="data of the evaluation loss, computed every training.eval_steps",
    )
    save_minutes: Annotated[float, Field(ge=0, le=1 << 20)] | None = Field(
        None,
        description="minutes between checkpoints; 0: never by time; null: 10, unless"
        " training.save_steps or training.save_strategy is set",
    )
    device: Device = Field("auto", description="auto: an accelerator if there is one, else the CPU")


class TrainConfig(RowsConfig):
    """The configuration of ``hybrid.train.run``; the YAML file has the same keys."""

    model: Annotated[dict[str, Any], AfterValidator(_check_model)] = Field(
        description="keys of HybridConfig; or model_type: NAME; or path: DIR"
    )
    tokenizer: Text = Field(
        "bytes", description="bytes, or a Hugging Face tokenizer by name or path"
    )
    eval_rows: int = Field(
        64, ge=1, le=1 << 28, description="number of evaluated rows of eval_data"
    )
    probes: dict[Annotated[str, AfterValidator(_check_name)], ProbeConfig] = Field(
        default_factory=dict, description="name -> probe: recall measured during training"
    )
    context_parallel: int = Field(
        1, ge=1, le=1 << 16, description="processes per row, each with one slice of it"
    )
    muon: Annotated[MuonConfig | None, BeforeValidator(_switched)] = Field(
        None, description="true or options: update matrices with Muon"
    )
    multi_step: Annotated[MultiStepConfig | None, BeforeValidator(_switched)] = Field(
        None,
        description="true or options: a piecewise constant rate instead of training.lr_scheduler_type",
    )
    decay_embeddings: bool = Field(
        False, description="weight decay on embeddings (OLMo 2 has none)"
    )
    decay_norms: bool = Field(False, description="weight decay on the weights of norms")
    decay_gates: bool = Field(
        False, description="weight decay on gates, decays and similar parameters"
    )
    training: Annotated[dict[str, Any], AfterValidator(training_values)] = Field(
        default_factory=dict, description="any key of transformers.TrainingArguments"
    )

    @classmethod
    def place_of(cls, key: str) -> str | None:
        """See ``Declared.place_of``: keys of the model, and of training under their usual names."""
        if key in {field.name for field in dataclasses.fields(HybridConfig)}:
            return f"model.{key}"
        key = USUAL_NAMES.get(key, key)
        return f"training.{key}" if key in training_hints() else None

    @classmethod
    def refuse_unknown_keys(cls, values: Mapping[str, Any], title: str) -> None:
        """Check the names of the keys at the top, for commands that read a part of the file.

        Raises:
            ConfigError: with one line for each unknown key.
        """
        known = {*cls.model_fields, "budget", "published"}  # parameters, in configs/models
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError([f"{key}: {cls.unknown_key(str(key))}" for key in unknown], title)

    @model_validator(mode="after")
    def _one_schedule(self) -> TrainConfig:
        if self.multi_step is not None and "lr_scheduler_type" in self.training:
            refuse(
                ["multi_step: expected no training.lr_scheduler_type with it, got one; remove one"]
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that ``parse_config`` accepts."""
        values = self.model_dump()
        for key in ("data", "eval_data"):
            values[key] = [source.as_dict() for source in getattr(self, key)]
        values["probes"] = {name: probe.as_dict() for name, probe in self.probes.items()}
        return values


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply ``key=value`` overrides, and return the checked configuration.

    Args:
        path: the file. Its name is the default of ``training.output_dir``: ``runs/NAME``.
        overrides: e.g. ``training.max_steps=10``, ``data[0].weight=0.3``; values are YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    values = yaml.apply_overrides(yaml.read(path), overrides)
    training = values.setdefault("training", {})
    if isinstance(training, dict):
        training.setdefault("output_dir", str(Path("runs") / Path(path).stem))
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], title: str = "the config") -> TrainConfig:
    """Check plain values and return the configuration; report the mistakes of all parts together.

    Raises:
        ConfigError: with one line for each mistake.
    """
    config = parse(TrainConfig, values, title)
    return config.model_copy(update={"training": TRAINING_DEFAULTS | config.training})
