"""Keys of `training:` that a run decides itself, and values that cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hybrid.config.options import did_you_mean

# Keys that would break what a run promises, and why.
DECIDED: dict[str, str] = {
    "resume_from_checkpoint": "the same command goes on from the newest whole checkpoint by itself",
    "ignore_data_skip": "a run goes on with the rows that come next",
    "save_only_model": "a run could not go on from such a checkpoint; its folder has the model alone",
    "save_on_each_node": "transformers writes weights by the first process alone; use a folder that all"
    " machines share",
    "auto_find_batch_size": "the rows of a step are fixed; set per_device_train_batch_size and"
    " gradient_accumulation_steps",
    "train_sampling_strategy": "the rows' order is that of the mixture",
}

# What others call a key of transformers', too far from it in letters to be found by them.
USUAL_NAMES: dict[str, str] = {
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "scheduler": "lr_scheduler_type",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "grad_clip": "max_grad_norm",
    "clip": "max_grad_norm",
    "optimizer": "optim",
    "num_workers": "dataloader_num_workers",
    "compile": "torch_compile",
}

Rule = tuple[str, Callable[[float], bool]]
POSITIVE: Rule = ("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0: Rule = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Rule = ("at least 1", lambda x: x >= 1)
MOST = 1 << 40  # steps and rows: more than any run has
BELOW_1: Rule = ("at least 0 and below 1", lambda x: 0 <= x < 1)
STEPS: Rule = ("a number of steps, or a share of them between 0 and 1", lambda x: x > 0)
SEED: Rule = ("from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
ENDS: Rule = ("at least 1, or -1 for num_train_epochs", lambda x: x >= 1 or x == -1)

RULES: dict[str, Rule] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": ENDS,
    "num_train_epochs": POSITIVE,
    "logging_steps": STEPS,
    "save_steps": STEPS,
    "eval_steps": STEPS,
    "save_total_limit": AT_LEAST_1,
    "dataloader_num_workers": AT_LEAST_0,
    "learning_rate": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "warmup_steps": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "adam_epsilon": POSITIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "label_smoothing_factor": BELOW_1,
    "seed": SEED,
    "data_seed": SEED,
}

MUON_RULES: dict[str, Rule] = {
    "learning_rate": AT_LEAST_0,
    "momentum": BELOW_1,
    "ns_steps": ("1 to 99", lambda x: 1 <= x < 100),
}


def outside(values: Mapping[str, Any], rules: Mapping[str, Rule], path: str) -> list[str]:
    """One line for each number that its rule does not allow."""
    return [
        f"{path}.{key}: expected {words}, found {values[key]}"
        for key, (words, allowed) in rules.items()
        if isinstance(values.get(key), (int, float)) and not allowed(values[key])
    ]


def unmeant(values: Mapping[str, Any], path: str) -> list[str]:
    """One line for each number that is not one, or that is beyond anything a run could have."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return [
        f"{path}.{key}: expected a number below 2^40, found {value}"
        for key, value in numbers.items()
        if value != value or (isinstance(value, int) and abs(value) > MOST)
    ]


def without_effect(values: Mapping[str, Any]) -> list[str]:
    """One line for each key of `training:` that another one has to go with."""
    if values.get("dataloader_num_workers"):
        return []
    return [
        f"training.{key}: needs training.dataloader_num_workers above 0"
        for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor")
        if values.get(key)
    ]


def nearest(key: str, known: Iterable[str]) -> str:
    """The tail of an error message on a key of `training:` that there is not."""
    if key in USUAL_NAMES:
        return f"did you mean {USUAL_NAMES[key]!r}?"
    return did_you_mean(key, set(known) - set(DECIDED))


def decided(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """One line for each key that asks for something else than what a run does."""
    return [
        f"training.{key}: {why}; leave it out"
        for key, why in DECIDED.items()
        if key in values and values[key] != defaults[key]
    ]
