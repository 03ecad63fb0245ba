"""Probes: recall during training as exact matches of labelled tokens, by length and by depth.

A probe draws its rows once, from its own random stream, and evaluates every label by teacher
forcing. It does not affect the run: no dropout, no gradient, no random numbers, no counters. The
losses with and without a probe are equal bit for bit.

The label at t is predicted from the token at t - 1. The answer's position is the last earlier
position at which that token was followed by this label: a needle, or a key and its value. The depth
is this position divided by t - 1, and is 0 at the start of the row. Labels that do not occur
earlier (e.g. a running product) have no depth.

Legend: B rows, T tokens, P labelled positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hybrid.data.collate import RowCollator
from hybrid.data.packing import IGNORE, Row
from hybrid.data.rows import Rows
from hybrid.data.slices import silent

ANYWHERE = -1  # the bucket of labels without a depth


@dataclass(frozen=True)
class Probe:
    """The rows of a probe, and when it runs.

    Attributes:
        name: results are logged as ``eval_NAME_accuracy...``, so that trackers group them with
            evaluation.
        every: optimizer steps between two probes.
        rows: length -> rows of that length.
        depth_buckets: number of equal parts of a row for accuracy by depth.
    """

    name: str
    every: int
    rows: dict[int, list[Row]]
    depth_buckets: int

    def due(self, step: int, last: int) -> bool:
        """Return whether the probe runs after optimizer step ``step`` of ``last``."""
        return step % self.every == 0 or step == last


def draw(source: Rows, rows: int) -> list[Row]:
    """Return the first rows of a source.

    Raises:
        ValueError: no row has a label.
    """
    drawn = [source.row(i) for i in range(rows)]
    if all((row["labels"][1:] == IGNORE).all() for row in drawn):
        raise ValueError(f"expected a label in the first {rows} rows, got none")
    return drawn


def buckets(ids: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Return (T,) int64: the part of the row with the answer to each label, from 0, or ``ANYWHERE``."""
    found = np.full(len(ids), ANYWHERE, np.int64)
    for t in np.flatnonzero(labels != IGNORE):
        if t < 2:
            continue
        before = np.flatnonzero((ids[: t - 1] == ids[t - 1]) & (ids[1:t] == labels[t]))
        if before.size:
            found[t] = min(parts - 1, int(before[-1]) * parts // (int(t) - 1))
    return found


class Probes(TrainerCallback):
    """Callback that runs the probes that are due after an optimizer step."""

    def __init__(
        self,
        trainer: Trainer,
        probes: Sequence[Probe],
        clock_stopped: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.trainer, self.probes, self.clock_stopped = trainer, probes, clock_stopped

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log the results of the probes that are due; training's own log and clock do not change."""
        due = [p for p in self.probes if p.due(state.global_step, state.max_steps)]
        if due:
            with self.clock_stopped():
                wanted = control.should_log
                for probe in due:
                    self.trainer.log(ask(self.trainer, probe))
                control.should_log = wanted  # ``log`` has reset it


@torch.no_grad()
def ask(trainer: Trainer, probe: Probe) -> dict[str, float]:
    """Return the share of labels with the largest logit: overall, by length, and by length and
    depth.
    """
    counts = {
        length: _count(trainer, rows, probe.depth_buckets) for length, rows in probe.rows.items()
    }
    return figures(f"eval_{probe.name}_accuracy", counts)


def figures(prefix: str, counts: dict[int, torch.Tensor]) -> dict[str, float]:
    """Convert counts (parts + 1, 2) of correct and all labels, by length, to logged values.

    Skip empty buckets.
    """
    logs = {prefix: _share(torch.stack([c.sum(0) for c in counts.values()]).sum(0))}
    for length, count in counts.items():
        if len(counts) > 1:
            logs[f"{prefix}_length_{length}"] = _share(count.sum(0))
        parts = len(count) - 1
        for part in range(parts):
            if count[part, 1] and parts > 1:
                name = f"{prefix}_length_{length}_depth_{part / parts:.2f}"
                logs[name] = _share(count[part])
    return logs


def _share(count: torch.Tensor) -> float:
    right, asked = count.tolist()
    return right / asked if asked else float("nan")


def _count(trainer: Trainer, rows: Sequence[Row], parts: int) -> torch.Tensor:
    """Return (parts + 1, 2): correct and all labels in each part.

    The last row is labels without a depth.
    """
    counts = torch.zeros(parts + 1, 2, dtype=torch.int64)
    model: Any = trainer.model  # sharded if the run is; not compiled for the probe's lengths
    training = model.training
    model.eval()
    try:
        for batch in _batches(trainer, rows):
            right, asked = _met(trainer, model, batch)
            for row, met, wanted in zip(batch, right, asked, strict=True):
                part = buckets(row["input_ids"], row["labels"], parts)[1:][wanted]
                for index, good in zip(part, met[wanted], strict=True):
                    counts[index] += torch.tensor([int(good), 1])
    finally:
        model.train(training)
    return trainer.accelerator.reduce(counts.to(trainer.args.device), reduction="sum").cpu()


def _batches(trainer: Trainer, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield this process's rows.

    Every process gets the same number of batches, which sharding requires.
    """
    size, world = trainer.args.per_device_eval_batch_size, trainer.args.world_size
    filled = [*rows, *[silent(rows[0])] * (-len(rows) % world)]
    mine = filled[trainer.args.process_index :: world]
    for start in range(0, len(mine), size):
        yield mine[start : start + size]


def _met(trainer: Trainer, model: nn.Module, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, T - 1) bool, twice: whether label t + 1 has the largest logit at t, and whether it
    exists.
    """
    inputs: Any = trainer._prepare_inputs(RowCollator()(batch))
    asked = torch.from_numpy(np.stack([row["labels"] for row in batch])[:, 1:]) != IGNORE
    positions = asked.any(0).nonzero().squeeze(-1)  # (P,)
    met = torch.zeros_like(asked)
    few = (
        "logits_to_keep"
        in inspect.signature(trainer.accelerator.unwrap_model(model).forward).parameters
    )
    keep = {"logits_to_keep": positions.to(trainer.args.device)} if few else {}
    labels = inputs.pop("labels")
    with trainer.compute_loss_context_manager():
        logits = model(**inputs, **keep, use_cache=False).logits
    if not few:
        logits = logits[:, positions.to(logits.device)]
    wanted = labels[:, positions.to(labels.device) + 1]
    met[:, positions] = (logits.argmax(-1) == wanted).cpu()
    return met.numpy(), asked.numpy()
