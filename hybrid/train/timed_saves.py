"""Checkpoints by time: a run that is killed loses minutes, however long its steps take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hybrid.train.interrupt import Agreement

MINUTES = 10.0  # between checkpoints, where a config does not say
KEPT = 2  # newest checkpoints, where a config does not say


def minutes_between_saves(minutes: float | None, training: Mapping[str, Any]) -> float:
    """Minutes between checkpoints; 0 for none by time.

    Args:
        minutes: ``save_minutes`` of the config. None: ``MINUTES``, unless ``training`` says when to
            save.
        training: keys of ``transformers.TrainingArguments`` that the config sets.
    """
    if training.get("save_strategy") == "no":
        return 0.0
    if minutes is None:
        return 0.0 if {"save_strategy", "save_steps"} & training.keys() else MINUTES
    return minutes


class TimedSaves(TrainerCallback):
    """Asks for a checkpoint after the first step that ends a number of minutes after the last one.

    Args:
        minutes: since the last checkpoint, or since the start; 0 for no checkpoints by time.
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
        """Start the clock again, whoever asked for the checkpoint."""
        self._start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint when it is time on any process."""
        due = bool(self.seconds) and time.monotonic() - self._since >= self.seconds
        if self.seconds and self._agreement.of(int(due), args):
            control.should_save = True

    def _start(self) -> None:
        self._since = time.monotonic()
        self._agreement = Agreement()  # what was agreed on has been done
