"""``model:`` of a training configuration: build a model config from its keys and report mistakes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def model_mistakes(model: dict[str, Any]) -> list[str]:
    """Return the mistakes in ``model:`` that do not depend on the tokenizer."""
    if "path" in model:
        path = model["path"]
        if isinstance(path, str) and Path(path).is_dir():
            return []
        return [f"model.path: expected a folder, got {path!r}, which is none"]
    try:
        new_config(model, None)
    except ConfigError as error:
        return error.mistakes
    return []


def new_config(
    model: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """Return the configuration of a new model from the keys of ``model:``.

    Args:
        model: the keys, with ``model_type`` among them (default: a hybrid).
        tokenizer: supplies the vocabulary size and token ids that are unset; None for none.

    Raises:
        ConfigError: an unknown model type or key, or values that the model type refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    keys = dict(model)
    model_type = keys.pop("model_type", HybridConfig.model_type)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ConfigError([f"model.model_type: no model type {model_type!r}, {near}"])
    refuse_unknown(CONFIG_MAPPING[model_type], keys)
    if tokenizer is not None:
        keys.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            keys.setdefault(name, getattr(tokenizer, name))
    return make(lambda: AutoConfig.for_model(model_type, **keys))


def make(build_config: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """Call ``build_config``; convert its errors to a ConfigError about ``model``."""
    try:
        return build_config()
    except ConfigError as error:
        raise ConfigError([f"model.{line}" for line in error.mistakes]) from error
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError([f"model: {error}"]) from error


def refuse_unknown(config_class: type, keys: dict[str, Any]) -> None:
    """Refuse keys that a config class does not have; transformers would store them silently."""
    if config_class is HybridConfig:
        return  # it reports its own mistakes and those of its mixers
    if dataclasses.is_dataclass(config_class):
        known = {f.name for f in dataclasses.fields(config_class) if f.init}
    else:
        known = set(inspect.signature(config_class).parameters)
    known |= set(getattr(config_class, "attribute_map", {}))
    unknown = [k for k in keys if k not in known]
    if unknown:
        raise ConfigError([f"model.{k}: unknown key, {did_you_mean(k, known)}" for k in unknown])
