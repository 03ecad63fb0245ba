"""The model of a run: a new model from its configuration, or the model of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hybrid.checkpoint_paths import check_weights
from hybrid.config.options import ConfigError, first_few
from hybrid.train.config import TrainConfig
from hybrid.train.model_values import checkpoint_config, config_with_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the model's configuration.

    The tokenizer supplies sizes and ids that the config leaves unset.

    Raises:
        ConfigError: unknown keys, or a model too small for its tokenizer or for its rows.
    """
    if "path" in config.model:
        made = checkpoint_config(config.model)
    else:
        # before errors about the ids of a tokenizer that is too large
        if lines := _too_small(config.model.get("vocab_size"), config, tokenizer):
            raise ConfigError(lines)
        made = config_with_tokenizer(config.model, tokenizer)
    _check_sizes(made, config, tokenizer)
    return made


def _too_small(size: Any, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return why a vocabulary of this size is too small.

    Other checks report values that are not sizes.
    """
    if not isinstance(size, int) or not 0 < size < len(tokenizer):
        return []
    return [
        f"model.vocab_size: expected at least {len(tokenizer)}, the tokens of tokenizer"
        f" {config.tokenizer!r}, got {size}; try {len(tokenizer)} or remove the key"
    ]


def _check_sizes(
    made: PreTrainedConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    mistakes = _too_small(made.vocab_size, config, tokenizer)
    limit = getattr(made, "max_position_embeddings", None)
    if limit is not None and config.sequence_length > limit:
        mistakes.append(
            f"sequence_length: expected at most the model's max_position_embeddings {limit}, got"
            f" {config.sequence_length}; try {limit}"
        )
    if mistakes:
        raise ConfigError(mistakes)


def load_model(config: TrainConfig, made: PreTrainedConfig) -> PreTrainedModel:
    """Return a new model, or that of ``model.path``; in float32 unless ``model.dtype`` is set.

    Raises:
        ConfigError: the folder of ``model.path`` lacks weights of the model, or they cannot be
            read; or transformers refuses to build the model.
    """
    dtype = config.model.get("dtype", "float32")
    loaded: Any = None
    what = "model" if "path" not in config.model else f"model.path: {config.model['path']!r}"
    try:
        if "path" not in config.model:
            return AutoModelForCausalLM.from_config(made, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(
            check_weights(config.model["path"]),
            config=made,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below
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
            "the keys of model do not match its weights (try `hybrid import --layout` for another"
            " layout)",
        )
    return model
