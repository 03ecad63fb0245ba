"""Time a training step of a small hybrid and of the nearest transformers model with ``Trainer``.

    python -m hybrid.train.benchmark [--pairs LLLS DDDS MMMS] [--sizes text wide] [--json FILE]

A step lasts from the end of one optimizer step to the end of the next: fetching and
collating a row, forward, backward, clipping, AdamW, zeroing, logging. Both models have equal sizes
(parameters within 2%), the same random rows and the same arguments, and alternate in one process
(A/B/A/B). Times are CPU time of the process on one thread and figures are medians over turns, so
that other load on the machine affects both equally.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hybrid.config.hybrid_config import HybridConfig
from hybrid.data.collate import RowCollator
from hybrid.modeling.model import HybridForCausalLM
from hybrid.plan import count
from hybrid.train.throughput import training_flops_per_token
from hybrid.train.trainer import HybridTrainer

LAYERS = 4
HEAD = 64
AGREE = 0.02  # maximum relative difference of parameters
WARM = 1  # uncounted steps at the start of a turn
SOFTMAX_LAST = ["linear_attention"] * (LAYERS - 1) + ["full_attention"]


@dataclass(frozen=True)
class Size:
    """Sizes common to all models."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int

    @property
    def heads(self) -> int:
        """Number of heads of every mixer, each with ``HEAD`` dims."""
        return self.hidden_size // HEAD

    @property
    def ours(self) -> dict[str, Any]:
        """Return the keys of our config."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "feed_forwards": {"-": {"intermediate_size": self.intermediate_size}},
        }

    @property
    def theirs(self) -> dict[str, Any]:
        """Return the keys of transformers' configs."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "tie_word_embeddings": True,
            "max_position_embeddings": 65536,
        }


# The model of configs/train/text.yaml, and a wider one with a larger share of matrix products.
SIZES = {"text": Size(128, 352, 259), "wide": Size(256, 704, 4096)}

# Our keys, transformers' model type, and transformers' keys, as functions of the number of heads.
Pair = tuple[dict[str, dict[str, Any]], str, dict[str, Any]]


def _lightning(heads: int) -> Pair:
    # a mixture with one expert for every token equals a dense feed-forward
    keys = {"num_local_experts": 1, "num_experts_per_tok": 1, "layer_types": SOFTMAX_LAST}
    return {"L": {"num_heads": heads}, "S": {"num_heads": heads}}, "minimax", keys


def _gated_delta(heads: int) -> Pair:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.25}
    ours = {
        "D": {"num_heads": heads, "head_dim": HEAD},
        "S": {"num_heads": heads, "qk_norm": "head", "output_gate": True, "rope_parameters": rope},
    }
    keys = {
        "head_dim": HEAD,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "mlp_only_layers": list(range(LAYERS)),
        "layer_types": SOFTMAX_LAST,
    }
    return ours, "qwen3_next", keys


def _mamba2(heads: int) -> Pair:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    ours = {
        "M": {"num_heads": 2 * heads, "head_dim": HEAD, "state_size": HEAD},
        "S": {"num_heads": heads, "rope_parameters": rope},
    }
    keys = {
        "attn_layer_indices": [LAYERS - 1],
        "mamba_n_heads": 2 * heads,
        "mamba_d_head": HEAD,
        "mamba_d_state": HEAD,
    }
    return ours, "bamba", keys


PAIRS = {"LLLS": _lightning, "DDDS": _gated_delta, "MMMS": _mamba2}


def build(layout: str, size: Size) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return our model and transformers', with random weights.

    Raises:
        ValueError: the numbers of parameters differ by more than ``AGREE``.
    """
    mixers, model_type, keys = PAIRS[layout](size.heads)
    torch.manual_seed(0)
    ours = HybridForCausalLM(HybridConfig(layout=layout, mixers=mixers, **size.ours))
    config = AutoConfig.for_model(model_type, **{**size.theirs, **keys})
    theirs = AutoModelForCausalLM.from_config(config)
    sizes = count(ours), count(theirs)
    if abs(sizes[0] / sizes[1] - 1) > AGREE:
        raise ValueError(
            f"{layout}: expected about as many parameters as {model_type}, {sizes[1]:,}, got"
            f" {sizes[0]:,}"
        )
    return ours, theirs


class RandomRows(Dataset):
    """Rows of random ids; row i is a function of i."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.rows, self.length, self.vocabulary = rows, length, vocabulary

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocabulary, (self.length,), generator=generator).numpy()
        return {"input_ids": ids, "labels": ids}


class PositionedRows(RandomRows):
    """The same rows with ``position_ids``, as our sources yield them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {**row, "position_ids": torch.arange(self.length).numpy()}


class StepClock(TrainerCallback):
    """Callback that measures the CPU time between the ends of successive optimizer steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of a turn."""
        self.ends = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time of a step."""
        self.ends.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Return the seconds of each counted step."""
        lasted = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return lasted[WARM - 1 :]


@dataclass(frozen=True)
class Result:
    """Result of one pair at one length: CPU seconds per step, medians over turns."""

    pair: str
    rival: str
    size: str
    length: int
    parameters: int
    their_parameters: int
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Speed of our model relative to transformers'."""
        return self.theirs / self.ours


def arguments(folder: str, steps: int) -> TrainingArguments:
    """Return the training arguments of both models."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def measure(name: str, size: str, length: int, turns: int, steps: int, folder: str) -> Result:
    """Train both models of a pair in turns, and return the times."""
    ours, theirs = build(name, SIZES[size])
    steps += WARM
    args = arguments(folder, steps)
    sides = (
        HybridTrainer(
            tokens_per_step=length,
            flops_per_token=training_flops_per_token(ours.config, length),
            muon=None,
            resolved={},
            run={},
            model=ours,
            args=args,
            train_dataset=PositionedRows(steps, length, SIZES[size].vocab_size),
            data_collator=RowCollator(),
        ),
        Trainer(
            model=theirs,
            args=args,
            train_dataset=RandomRows(steps, length, SIZES[size].vocab_size),
            data_collator=default_data_collator,
        ),
    )
    clocks = StepClock(), StepClock()
    for trainer, clock in zip(sides, clocks, strict=True):
        trainer.add_callback(clock)
        trainer.log = lambda *args, **kwargs: None  # both would print their logs
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for trainer, clock, found in zip(sides, clocks, times, strict=True):
            trainer.train()
            found += clock.steps
    medians = [statistics.median(found) for found in times]
    rival = theirs.config.model_type
    return Result(name, rival, size, length, count(ours), count(theirs), *medians)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--turns", type=int, default=3, help="turns of each model")
    parser.add_argument("--steps", type=int, default=2, help="counted steps per turn")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    # If installed, transformers calls its kernels, which do not run on a CPU.
    sys.modules["fla"] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # about missing optional kernels of transformers
    run = versions()
    print("  ".join(f"{name} {value}" for name, value in run.items()))
    print("| ours | theirs | size | T | parameters | ours, s | theirs, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size, name, length in product(options.sizes, options.pairs, options.lengths):
            results.append(measure(name, size, length, options.turns, options.steps, folder))
            print(line(results[-1]), flush=True)
    if options.json:
        found = {"run": run, "results": [asdict(r) | {"ratio": r.ratio} for r in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def line(r: Result) -> str:
    """Return one line of the table."""
    sizes = f"{r.parameters:,} / {r.their_parameters:,}"
    times = f"{r.ours:.3f} | {r.theirs:.3f} | {r.ratio:.2f}x"
    return f"| {r.pair} | {r.rival} | {r.size} | {r.length} | {sizes} | {times} |"


def versions() -> dict[str, str]:
    """Return the versions of the measured software, and the processor."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main()
