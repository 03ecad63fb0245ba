"""A checked configuration becomes tokenizer, model, data and arguments; what cannot be is refused."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from hybrid.config import HybridConfig
from hybrid.data.mixture import Mixture
from hybrid.data.rows import Rows
from hybrid.data.sources import RowFormat, SourceConfig, open_source
from hybrid.options import ConfigError, did_you_mean
from hybrid.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """transformers' arguments, on the device that was asked for.

    Raises:
        ConfigError: the device is absent, or transformers refuses a value.
    """
    values = dict(config.training)
    check_device(config.device)
    if config.device == "cpu":
        values["use_cpu"] = True
    if not torch.accelerator.is_available() or values.get("use_cpu"):
        # Pinned memory is for copies to an accelerator; torch warns where there is none.
        values.setdefault("dataloader_pin_memory", False)
    values["remove_unused_columns"] = False
    values.setdefault("prediction_loss_only", True)
    if config.eval_data and "eval_strategy" not in values:
        values["eval_strategy"] = "steps"
    try:
        return TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise ConfigError([f"training: {error}"]) from error


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: naming what there is.
    """
    if device in ("auto", "cpu"):
        return
    present = torch.accelerator.current_accelerator(check_available=True)
    if present is None or present.type != device:
        there = "cpu" if present is None else f"{present.type}, cpu"
        raise ConfigError([f"device: there is no {device!r} here; this machine has: {there}"])


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration; sizes and ids that the config leaves open come from the tokenizer.

    Raises:
        ConfigError: unknown keys, or a model too small for its tokenizer or for its rows.
    """
    keys = {k: v for k, v in config.model.items() if k not in ("path", "model_type")}
    if "path" in config.model:
        base = AutoConfig.from_pretrained(config.model["path"])
        _refuse_unknown(type(base), keys)
        made = _make(lambda: AutoConfig.from_pretrained(config.model["path"], **keys))
    else:
        made = _new_config(config.model.get("model_type", HybridConfig.model_type), keys, tokenizer)
    _check_sizes(made, config, tokenizer)
    return made


def _new_config(
    model_type: str, keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ConfigError([f"model.model_type: no model type {model_type!r}, {near}"])
    _refuse_unknown(CONFIG_MAPPING[model_type], keys)
    keys = {"vocab_size": len(tokenizer), **keys}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        keys.setdefault(name, getattr(tokenizer, name))
    return _make(lambda: AutoConfig.for_model(model_type, **keys))


def _make(build_config: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return build_config()
    except ConfigError as error:
        raise ConfigError([f"model.{line}" for line in error.mistakes]) from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError([f"model: {error}"]) from error


def _refuse_unknown(config_class: type, keys: dict[str, Any]) -> None:
    if config_class is HybridConfig:
        return  # which names its own mistakes, and those of its mixers
    if dataclasses.is_dataclass(config_class):
        known = {f.name for f in dataclasses.fields(config_class) if f.init}
    else:
        known = set(inspect.signature(config_class).parameters)
    known |= set(getattr(config_class, "attribute_map", {}))
    unknown = [k for k in keys if k not in known]
    if unknown:
        raise ConfigError([f"model.{k}: unknown key, {did_you_mean(k, known)}" for k in unknown])


def _check_sizes(
    made: PreTrainedConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    mistakes = []
    if len(tokenizer) > made.vocab_size:
        mistakes.append(
            f"model.vocab_size: {made.vocab_size} is less than the {len(tokenizer)} tokens of tokenizer"
            f" {config.tokenizer!r}; leave it out or set at least {len(tokenizer)}"
        )
    limit = getattr(made, "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        mistakes.append(
            f"sequence_length: {config.sequence_length} is beyond the model's max_position_embeddings"
            f" {limit}; shorten the one or raise the other"
        )
    if mistakes:
        raise ConfigError(mistakes)


def load_model(config: TrainConfig, made: PreTrainedConfig) -> PreTrainedModel:
    """A new model, or that of `model.path`; float32 unless `model.dtype` says otherwise."""
    dtype = config.model.get("dtype", "float32")
    if "path" in config.model:
        return AutoModelForCausalLM.from_pretrained(config.model["path"], config=made, dtype=dtype)
    return AutoModelForCausalLM.from_config(made, dtype=dtype)


def open_sources(
    configs: Sequence[SourceConfig],
    key: str,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    seed: int,
) -> list[Rows]:
    """Every source opened and its first row looked at.

    Raises:
        ConfigError: with one line for each source that cannot be used.
    """
    pad_id = tokenizer.pad_token_id
    pad_id = (tokenizer.eos_token_id or 0) if pad_id is None else pad_id
    rows = RowFormat(config.sequence_length, pad_id, config.packing, config.long_documents)
    opened, mistakes = [], []
    for number, source in enumerate(configs):
        try:
            # Each source draws from a stream of its own.
            opened.append(open_source(source, tokenizer, rows, seed * 1000 + number))
            largest = int(opened[-1].row(0)["input_ids"].max())
            if largest >= vocabulary:
                raise ValueError(
                    f"its first row has the token id {largest}, the model's vocab_size is {vocabulary}"
                )
        except (ValueError, TypeError) as error:
            mistakes.append(f"{key}[{number}] ({source.source}): {error}")
    if mistakes:
        raise ConfigError(mistakes)
    return opened


def total_steps(args: TrainingArguments, sources: Sequence[Rows], rows_per_step: int) -> int:
    """Optimizer steps of the run: `max_steps`, or what `num_train_epochs` over finite data makes.

    Raises:
        ConfigError: neither says when to end.
    """
    if args.max_steps > 0:
        return args.max_steps
    sizes = [s.per_epoch for s in sources]
    if None in sizes:
        raise ConfigError(
            [
                "training.max_steps: required, since a source of this run has no end (streams and plug-ins)"
            ]
        )
    return math.ceil(sum(s or 0 for s in sizes) * args.num_train_epochs / rows_per_step)


def mixture(
    sources: Sequence[Rows], configs: Sequence[SourceConfig], rows: int, seed: int
) -> Mixture:
    """The rows of a run as one data set.

    Raises:
        ConfigError: a weight is too small to count.
    """
    try:
        return Mixture(sources, [c.weight for c in configs], rows, seed)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
