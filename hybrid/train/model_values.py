"""``model:`` of a training configuration: build a model config from its keys and report mistakes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,  # pyright: ignore[reportPrivateImportUsage]
)

from hybrid.checkpoint_paths import check_source
from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.options import ConfigError, did_you_mean
from hybrid.config.validation import TOKEN_IDS, tokens_outside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class ModelKeys(dict[str, Any]):
    """The keys of ``model:``, and the configuration that they were checked with.

    Attributes:
        built: the configuration of a new model, without the sizes and ids of a tokenizer; None for
            a checkpoint.
    """

    def __init__(self, keys: dict[str, Any], built: PreTrainedConfig | None) -> None:
        super().__init__(keys)
        self.built = built


def check_model(model: dict[str, Any]) -> ModelKeys:
    """Check the keys of ``model:`` as far as they do not depend on the tokenizer.

    Raises:
        ConfigError: with one line for each mistake, which begins with ``model``.
    """
    if "path" not in model:
        return ModelKeys(model, _new_config(model))
    path = model["path"]
    if isinstance(path, str) and Path(path).is_dir():
        return ModelKeys(model, None)
    raise ConfigError([f"model.path: expected an existing folder, got {path!r}"])


def config_with_tokenizer(
    model: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """Return the configuration of a new model from the keys of ``model:``.

    Args:
        model: the keys, with ``model_type`` among them (default: a hybrid).
        tokenizer: supplies the vocabulary size and token ids that are unset.

    Raises:
        ConfigError: an unknown model type or key, or values that the model type refuses.
    """
    supplied = {"vocab_size": len(tokenizer)}
    supplied |= {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    supplied = {name: value for name, value in supplied.items() if name not in model}
    built = model.built if isinstance(model, ModelKeys) else None
    if not isinstance(built, HybridConfig):
        return _new_config(supplied | model)
    config = built.changed(**supplied)
    if lines := tokens_outside(config):
        raise ConfigError([f"model.{line}" for line in lines])
    return config


def checkpoint_config(model: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of the checkpoint ``model.path``, with the other keys of ``model:``.

    Raises:
        ConfigError: the folder has no configuration that can be read, an unknown key, or values
            that the model type refuses.
    """
    path, keys = model["path"], {k: v for k, v in model.items() if k != "path"}
    source = make(lambda: check_source(path))
    values = make(lambda: PreTrainedConfig.get_config_dict(source))[0]
    if values.get("model_type") == HybridConfig.model_type:
        return make(lambda: HybridConfig.from_dict(values | keys | {"name_or_path": path}))
    config = make(lambda: AutoConfig.from_pretrained(source))
    refuse_unknown(type(config), keys)
    return make(lambda: AutoConfig.from_pretrained(source, **keys))


def _new_config(model: dict[str, Any]) -> PreTrainedConfig:
    keys = dict(model)
    model_type = keys.pop("model_type", HybridConfig.model_type)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise ConfigError([f"model.model_type: unknown model type {model_type!r}, {near}"])
    refuse_unknown(CONFIG_MAPPING[model_type], keys)
    return make(lambda: AutoConfig.for_model(model_type, **keys))


def make(build_config: Callable[[], T]) -> T:
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
