"""Profile the steps of ``hybrid.train.benchmark``: CPU time per operation, for both models.

    python -m hybrid.train.operations [--pair LLLS] [--size text] [--length 4096] [--steps 4]

Measures the CPU time of the computing thread in each operation that PyTorch dispatches, forward and
backward. Measuring adds microseconds per operation to a step.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hybrid.modeling.model import HybridForCausalLM
from hybrid.train.benchmark import PAIRS, SIZES, build

WARM = 3  # unmeasured steps at the start


class OperationTimes(TorchDispatchMode):
    """Mode that records ``seconds`` and ``calls`` of each operation, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and record its time."""
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[str(func)] += time.thread_time() - start
        self.calls[str(func)] += 1
        return out


def watch(model: PreTrainedModel, vocabulary: int, length: int, steps: int) -> OperationTimes:
    """Train a model on one random row of ``length`` tokens, and measure ``steps`` steps."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if isinstance(model, HybridForCausalLM):
        batch["position_ids"] = torch.arange(length)[None]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.train()

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM):
        step()
    with OperationTimes() as times:
        for _ in range(steps):
            step()
    return times


def table(times: OperationTimes, steps: int, rows: int) -> list[str]:
    """Return the lines of a table: the slowest operations per step, and the sum of all."""
    total = sum(times.seconds.values())
    lines = ["| operation | calls | s | share |", "|---|---|---|---|"]
    for name, seconds in sorted(times.seconds.items(), key=lambda item: -item[1])[:rows]:
        calls = times.calls[name] / steps
        lines.append(f"| {name} | {calls:g} | {seconds / steps:.4f} | {seconds / total:.1%} |")
    calls = sum(times.calls.values()) / steps
    return [*lines, f"| all | {calls:g} | {total / steps:.4f} | |"]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(PAIRS), default="LLLS")
    parser.add_argument("--size", choices=list(SIZES), default="text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each model")
    parser.add_argument("--rows", type=int, default=20, help="operations to print")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    # as in the benchmark
    sys.modules["fla"] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    vocabulary = SIZES[options.size].vocab_size
    for model in build(options.pair, SIZES[options.size]):
        times = watch(model, vocabulary, options.length, options.steps)
        print(f"\n{model.config.model_type}\n")
        print("\n".join(table(times, options.steps, options.rows)), flush=True)


if __name__ == "__main__":
    main()
