"""Checkpoints by time: a killed run loses minutes, independent of the time of its steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hybrid.train.interrupt import Agreement

MINUTES = 10.0  # default minutes between checkpoints
KEPT = 2  # default number of newest checkpoints to keep


def minutes_between_saves(minutes: float | None, training: Mapping[str, Any]) -> float:
    """Return the minutes between checkpoints; 0 means never by time.

    Args:
        minutes: ``save_minutes`` of the config. None: ``MINUTES``, unless ``training`` selects when
            to save.
        training: keys of ``transformers.TrainingArguments`` that the config sets.
    """
    if training.get("save_strategy") == "no":
        return 0.0
    if minutes is None:
        return 0.0 if {"save_strategy", "save_steps"} & training.keys() else MINUTES
    return minutes


class TimedSaves(TrainerCallback):
    """Request a checkpoint after the first step that ends some minutes after the last checkpoint.

    Args:
        minutes: since the last checkpoint, or since the start; 0 means never by time.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._since = 0.0
        self._agreement = Agreement()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart the clock after any checkpoint."""
        self._start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request a checkpoint when the time has passed on any process."""
        due = bool(self.seconds) and time.monotonic() - self._since >= self.seconds
        if self.seconds and self._agreement.of(int(due), args):
            control.should_save = True

    def _start(self) -> None:
        self._since = time.monotonic()
        self._agreement = Agreement()  # the request has been handled
