"""Exit of a training process after an error: one line for the user and for the launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from hybrid.config.options import ConfigError
from hybrid.train.config import TrainConfig

FAILED = 2  # exit status


class OutOfMemory(ConfigError):
    """Model, optimizer and batch do not fit in the memory of a device or of the machine."""


def failed(line: str, silent: bool = False) -> int:
    """Print the reason why this process ends, record it for torch's launcher; return the exit
    status.

    Args:
        line: the reason.
        silent: do not print, because another process of the run does.
    """
    if not silent:
        print(line, file=sys.stderr)
    # torch's launcher prints it at the end of its report, instead of a hint on tracebacks
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": line, "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(reason), encoding="utf-8")
    return FAILED


@contextmanager
def memory_refusals(config: TrainConfig) -> Iterator[None]:
    """Convert a failed allocation to an error with settings that need less memory.

    Raises:
        OutOfMemory: torch could not allocate, on a device or in main memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        reason = str(error).strip().splitlines()[0].split(" Tried to", 1)[0]
        raise OutOfMemory([f"{_with_less(config)} ({reason})"], "the run") from error


def _with_less(config: TrainConfig) -> str:
    """Return an error line with the key that uses most memory, and smaller values for the same run."""
    key = "per_device_train_batch_size"
    rows = int(config.training.get(key, TrainingArguments.per_device_train_batch_size))
    times = int(config.training.get("gradient_accumulation_steps", 1))
    fewer = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None)
    ways = []
    if fewer is not None:
        accumulated = f"training.gradient_accumulation_steps={times * rows // fewer}"
        ways.append(f"{fewer} with {accumulated}, which continues this run")
    if not config.training.get("gradient_checkpointing"):
        ways.append("training.gradient_checkpointing=true")
    ways.append(f"a sequence_length below {config.sequence_length}")
    return (
        f"training.{key}: expected rows that fit in memory, got {rows} of"
        f" {config.sequence_length} tokens; try {', or '.join(ways)}"
    )
