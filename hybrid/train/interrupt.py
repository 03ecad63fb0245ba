"""Ctrl-C and SIGTERM: a run stops after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hybrid.terminal import INTERRUPTED, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal signals every process, and launchers forward the signal: both are the same Ctrl-C.
SAME = 5.0  # seconds


class Agreement:
    """The maximum over all processes of a number, agreed on after each step.

    Each process reads the maximum one step later, when its all-reduce is complete, so that no step
    waits.
    """

    def __init__(self) -> None:
        self._largest: torch.Tensor | None = None

    def of(self, value: int, args: TrainingArguments) -> int:
        """Return the maximum of the previous step; with one process, its current value."""
        if not dist.is_initialized() or args.world_size == 1:
            return value
        before = 0 if self._largest is None else int(self._largest.item())
        self._largest = torch.tensor(value, device=args.device)
        dist.all_reduce(self._largest, dist.ReduceOp.MAX)
        return before


class StopSignals(TrainerCallback):
    """Stop a run after the step in which one of its processes receives SIGINT or SIGTERM.

    All processes stop after the same step. A second SIGINT stops immediately.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.stopped = False
        self._since = 0.0
        self._agreement = Agreement()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle signals in this context; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def handle(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a data-loader worker, which its run ends
                return
            if not self.signal:
                self.signal, self._since = number, time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - self._since > SAME:
                raise KeyboardInterrupt

        # an ignored signal (nohup, a background job) stays ignored
        watched = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in watched}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Request a checkpoint and the end of training."""
        if self._asked(args) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
        return control

    def _asked(self, args: TrainingArguments) -> int:
        """Return the signal that one of the processes has received, agreed by all."""
        agreed = self._agreement.of(self.signal, args)
        self.signal = self.signal or agreed
        return agreed

    def outcome(self, args: TrainingArguments, step: int) -> Interrupted:
        """Return the exception that ends the run: what is saved, and how to resume."""
        kept = f"{args.output_dir}/checkpoint-{step} is kept: run the same command again to resume"
        if args.save_strategy == "no":
            kept = "no checkpoint is kept, because training.save_strategy is no"
        status = 128 + self.signal if self.signal else INTERRUPTED
        return Interrupted(f"interrupted after step {step}; {kept}", status)
