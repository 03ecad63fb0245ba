"""Keys of ``training:`` that a run sets itself, and values out of range."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any

from pydantic import AfterValidator, Field
from transformers import TrainingArguments

from hybrid.config.declare import LARGEST, bounded, check_keys, refuse
from hybrid.config.options import did_you_mean

# Keys that would break a guarantee of a run, with reasons that complete "expected ..., since".
DECIDED: dict[str, str] = {
    "resume_from_checkpoint": "the same command resumes from the newest complete checkpoint",
    "ignore_data_skip": "a run resumes at the next row",
    "save_only_model": "a run cannot resume from such a checkpoint; the output folder has the model",
    "save_on_each_node": "only the first process writes weights; use storage shared by all machines",
    "auto_find_batch_size": "the rows of a step are fixed; try a smaller per_device_train_batch_size"
    " and more gradient_accumulation_steps",
    "train_sampling_strategy": "the mixture determines the order of rows",
}

# Names of other libraries for keys of transformers that are too different for "did you mean".
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


def _ends(steps: int) -> int:
    if steps < 1 and steps != -1:
        raise ValueError("at least 1, or -1 for num_train_epochs")
    return steps


def _steps(steps: float) -> float:
    if not 0 < steps <= LARGEST:
        raise ValueError("number of steps, or fraction of all steps between 0 and 1")
    return steps


AT_LEAST_0, AT_LEAST_1, POSITIVE = Field(ge=0), Field(ge=1), Field(gt=0)
SHARE_BELOW_1 = Field(ge=0, lt=1)
SEED = Field(ge=0, lt=1 << 32)

# Bounds of the numbers that a run reads; all others have those of ``hybrid.config.declare``.
BOUNDS: dict[str, Any] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": AfterValidator(_ends),
    "num_train_epochs": Field(gt=0, le=LARGEST),
    "logging_steps": AfterValidator(_steps),
    "save_steps": AfterValidator(_steps),
    "eval_steps": AfterValidator(_steps),
    "save_total_limit": AT_LEAST_1,
    "dataloader_num_workers": AT_LEAST_0,
    "learning_rate": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "warmup_steps": Field(ge=0, le=LARGEST),
    "max_grad_norm": AT_LEAST_0,
    "adam_epsilon": POSITIVE,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "label_smoothing_factor": SHARE_BELOW_1,
    "seed": SEED,
    "data_seed": SEED,
}


@cache
def training_hints() -> dict[str, Any]:
    """Return the keys of transformers.TrainingArguments with their type annotations."""
    hints = typing.get_type_hints(TrainingArguments)
    return {
        f.name: bounded(_named(hints[f.name]), *filter(None, [BOUNDS.get(f.name)]))
        for f in dataclasses.fields(TrainingArguments)
        if f.init
    }


def _named(hint: Any) -> Any:
    """Return the names of the enumeration for ``SomeEnum | str``, else the annotation itself."""
    parts = typing.get_args(hint)
    for part in parts:
        if isinstance(part, type) and issubclass(part, Enum) and str in parts:
            names = typing.Literal[tuple(str(member.value) for member in part)]
            return names | None if type(None) in parts else names
    return hint


def training_values(values: Any) -> dict[str, Any]:
    """Check the keys of ``training:``; a validator of pydantic."""
    known = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    lines = [f"{k}: unknown key, {nearest(str(k), known)}" for k in values if k not in known]
    given = {key: value for key, value in values.items() if key in known}
    given |= {
        k: "no" for k, v in given.items() if v is False and k.endswith("_strategy")
    }  # YAML reads ``no`` as false
    if given.get("report_to", "") is None:
        given["report_to"] = "none"
    wrong, checked = check_keys(TrainingArguments, training_hints(), given)
    refuse([*lines, *wrong, *without_effect(given), *decided(given, known)])
    assert checked is not None
    return checked


def without_effect(values: Mapping[str, Any]) -> list[str]:
    """Return one line for each key of ``training:`` that has no effect without another key."""
    if values.get("dataloader_num_workers"):
        return []
    return [
        f"{key}: expected training.dataloader_num_workers above 0 with it, got 0"
        for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor")
        if values.get(key)
    ]


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the end of an error message on an unknown key of ``training:``."""
    if key in USUAL_NAMES:
        return f"did you mean {USUAL_NAMES[key]!r}?"
    return did_you_mean(key, set(known) - set(DECIDED))


def decided(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return one line for each key that conflicts with what a run sets itself."""
    return [
        f"{key}: expected {defaults[key]!r}, since {why}, got {values[key]!r}; remove the key"
        for key, why in DECIDED.items()
        if key in values and values[key] != defaults[key]
    ]
