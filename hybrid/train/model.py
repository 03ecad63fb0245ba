"""The model of a run: a new one by the keys of its configuration, or that of a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid.checkpoint_paths import check_source
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError, did_you_mean, first_few

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hybrid.train.config import TrainConfig


def model_mistakes(model: dict[str, Any]) -> list[str]:
    """What is wrong with `model:` on its own, whatever the tokenizer."""
    if "path" in model:
        path = model["path"]
        if isinstance(path, str) and Path(path).is_dir():
            return []
        return [f"model.path: expected a folder, got {path!r}, which is none"]
    try:
        _new_config(model, None)
    except ConfigError as error:
        return error.mistakes
    return []


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration; sizes and ids that the config leaves open come from the tokenizer.

    Raises:
        ConfigError: unknown keys, or a model too small for its tokenizer or for its rows.
    """
    if "path" in config.model:
        keys = {k: v for k, v in config.model.items() if k != "path"}
        path = config.model["path"]
        base = _make(lambda: AutoConfig.from_pretrained(check_source(path)))
        _refuse_unknown(type(base), keys)
        made = _make(lambda: AutoConfig.from_pretrained(path, **keys))
    else:
        # before the ids of a tokenizer that is too large are complained of
        if lines := _too_small(config.model.get("vocab_size"), config, tokenizer):
            raise ConfigError(lines)
        made = _new_config(config.model, tokenizer)
    _check_sizes(made, config, tokenizer)
    return made


def _new_config(
    model: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys = dict(model)
    model_type = keys.pop("model_type", HybridConfig.model_type)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ConfigError([f"model.model_type: no model type {model_type!r}, {near}"])
    _refuse_unknown(CONFIG_MAPPING[model_type], keys)
    if tokenizer is not None:
        keys.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            keys.setdefault(name, getattr(tokenizer, name))
    return _make(lambda: AutoConfig.for_model(model_type, **keys))


def _make(build_config: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return build_config()
    except ConfigError as error:
        raise ConfigError([f"model.{line}" for line in error.mistakes]) from error
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
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


def _too_small(size: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is wrong with a vocabulary of this size; what is no size is for others to say."""
    if not isinstance(size, int) or not 0 < size < len(tokenizer):
        return []
    return [
        f"model.vocab_size: {size} is less than the {len(tokenizer)} tokens of tokenizer"
        f" {config.tokenizer!r}; leave it out or set at least {len(tokenizer)}"
    ]


def _check_sizes(
    made: PreTrainedConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    mistakes = _too_small(made.vocab_size, config, tokenizer)
    limit = getattr(made, "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        mistakes.append(
            f"sequence_length: {config.sequence_length} is beyond the model's"
            " max_position_embeddings"
            f" {limit}; shorten the one or raise the other"
        )
    if mistakes:
        raise ConfigError(mistakes)


def load_model(config: TrainConfig, made: PreTrainedConfig) -> PreTrainedModel:
    """A new model, or that of `model.path`; float32 unless `model.dtype` says otherwise.

    Raises:
        ConfigError: the folder of `model.path` has not all weights of the model, or they cannot be
            read; or transformers refuses to build the model.
    """
    dtype = config.model.get("dtype", "float32")
    loaded: Any = None
    what = "model" if "path" not in config.model else f"model.path: {config.model['path']!r}"
    try:
        if "path" not in config.model:
            return AutoModelForCausalLM.from_config(made, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(
            config.model["path"],
            config=made,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # which are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError([f"{what}: {error}"]) from error
    model, report = loaded
    lines = [f"has no {name}" for name in sorted(report["missing_keys"])]
    lines += [f"has {name} in another shape" for name, *_ in sorted(report["mismatched_keys"])]
    if lines:
        raise ConfigError(
            first_few([f"{what} {line}" for line in lines]),
            "the model's keys do not fit the weights (`hybrid import --layout` changes layouts); the"
            " config",
        )
    return model
