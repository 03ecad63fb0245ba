"""The progress bar of the first process: loss and tokens per second."""

from __future__ import annotations

import math
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """A progress bar over optimizer steps; disabled by ``training.disable_tqdm``."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the bar at the current step."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", unit="step"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Advance the bar by one step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the logged values."""
        if self.bar is None or not logs:
            return
        shown = {k: f"{v:.4f}" for k, v in logs.items() if k in ("loss", "eval_loss")}
        shown |= {
            k.removeprefix("eval_"): f"{v:.3f}"
            for k, v in logs.items()
            if k.startswith("eval_") and k.endswith("_accuracy")
        }
        if "tokens_per_second" in logs:
            shown["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
        if "mfu" in logs:
            shown["MFU"] = f"{logs['mfu']:.1%}"
        self.shown |= shown
        self.bar.set_postfix(self.shown)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class LossWatch(TrainerCallback):
    """Log at each checkpoint and at the end, and stop a run whose loss is not finite.

    The logged loss is the mean since the last log. Logging at each checkpoint makes the means of a
    resumed run equal to those of an uninterrupted one.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Request a log wherever a checkpoint is requested, and at the end."""
        ended = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or ended
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop if the loss is not finite."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} at step {state.global_step}; try a lower"
                " training.learning_rate, more training.warmup_steps, or training.max_grad_norm; the"
                " last checkpoint is kept"
            )
