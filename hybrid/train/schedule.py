"""The learning rate over a run: the multi-step schedule, and a check of those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from hybrid.config.options import ConfigError, option


@dataclass(frozen=True)
class MultiStepConfig:
    """Warm-up, then a rate that falls in steps (DeepSeek LLM, arXiv 2401.02954, section 2.3)."""

    at: tuple[float, ...] = option((0.8, 0.9), help="where it falls, as shares of the steps")
    factors: tuple[float, ...] = option((0.316, 0.1), help="of the peak, from each of these on")

    def mistakes(self, path: str) -> list[str]:
        """Values that cannot be meant, a line each."""
        lines = []
        if len(self.at) != len(self.factors):
            lines.append(f"{path}: {len(self.at)} places in at, {len(self.factors)} factors")
        edges = (0.0, *self.at, 1.0)
        if any(a >= b for a, b in pairwise(edges)):
            lines.append(f"{path}.at: expected rising shares between 0 and 1, found {self.at}")
        if any(f < 0 for f in self.factors):
            lines.append(f"{path}.factors: must not be below 0, found {self.factors}")
        return lines

    def schedule(self, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
        """Linear from 0 over `warmup` steps; the shares are those of all `steps`."""
        return LambdaLR(optimizer, partial(_factor, self, warmup, steps))


def _factor(config: MultiStepConfig, warmup: int, steps: int, step: int) -> float:
    if step < warmup:
        return step / warmup
    passed = sum(step >= share * steps for share in config.at)
    return (1.0, *config.factors)[passed]


def check_schedule(args: TrainingArguments) -> None:
    """Refuse options that the schedule of a name does not take, or lacks.

    Raises:
        ConfigError: with transformers' own words.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)])
    options: Any = args.lr_scheduler_kwargs or {}  # a mapping by now
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
