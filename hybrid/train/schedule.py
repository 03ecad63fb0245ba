"""Learning rate schedules: the multi-step schedule, and checks of those of transformers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from hybrid.config.declare import Declared, NotNegative, Share, refuse
from hybrid.config.options import ConfigError


class MultiStepConfig(Declared):
    """Warm-up, then a piecewise constant rate (DeepSeek LLM, arXiv 2401.02954, section 2.3)."""

    at: list[Share] = Field(
        [0.8, 0.9], description="steps where the rate changes, as fractions of all"
    )
    factors: list[NotNegative] = Field(
        [0.316, 0.1], description="rate from each of these steps on, relative to the peak"
    )

    @field_validator("at")
    @classmethod
    def _rising(cls, at: list[float]) -> list[float]:
        if any(a >= b for a, b in pairwise(at)):
            refuse([f": expected ascending fractions between 0 and 1, got {at}"])
        return at

    @model_validator(mode="after")
    def _as_many(self) -> MultiStepConfig:
        if len(self.at) != len(self.factors):
            refuse(
                [f"factors: expected {len(self.at)}, one for each entry of at, got {self.factors}"]
            )
        return self

    def schedule(self, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
        """Return the scheduler: linear from 0 over ``warmup`` steps.

        ``at`` counts shares of all ``steps``.
        """
        return LambdaLR(optimizer, partial(_factor, self, warmup, steps))


def _factor(config: MultiStepConfig, warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return step / warmup
    passed = sum(step >= share * steps for share in config.at)
    return (1.0, *config.factors)[passed]


def check_schedule(args: TrainingArguments) -> None:
    """Refuse options that the selected schedule does not accept, and missing ones.

    Raises:
        ConfigError: with transformers' own message.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)])
    options: Any = args.lr_scheduler_kwargs or {}  # converted to a mapping
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ConfigError([f"training.lr_scheduler_kwargs: of {name!r}: {error}"]) from error
