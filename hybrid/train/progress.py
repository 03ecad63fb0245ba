"""The progress bar of the first process: loss and tokens per second."""

from __future__ import annotations

import math
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """A bar over optimizer steps; silent under `training.disable_tqdm`."""

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
        """Open the bar where the run stands."""
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
        """One step on."""
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
        """Show what was logged."""
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
    """Logs where it saves and at the end, and stops a run whose loss is not finite.

    The logged loss is a mean since the last log. Logging at each save makes the means after a
    resumed checkpoint the means of an uninterrupted run.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Ask for a log wherever a checkpoint is asked for, and at the end."""
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
        """Refuse to go on with a loss that is not a number."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}; lower training.learning_rate,"
                " lengthen"
                " training.warmup_steps, or set training.max_grad_norm; the last checkpoint is kept"
            )
