"""Recall while a run trains: exact matches of labelled tokens, by length and by depth.

A probe draws its rows once, from a stream of its own, and asks the model for every label by teacher
forcing. It leaves the run alone: no dropout, no gradient, no random number drawn, nothing counted; the
losses with a probe are those without, bit for bit.

The label at t is asked for by the token at t - 1. The last place before where that token was followed
by this label is where the answer stands: a needle, or a key and its value. Its place over t - 1 is the
depth, 0 at the start of the row. Labels that stand nowhere before (a running product) have no depth.

Legend: B rows, T tokens, P asked positions, V vocabulary.
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
    """What is asked, and when.

    Attributes:
        name: figures are logged as `eval_NAME_accuracy...`, so that trackers group them as evaluation.
        every: optimizer steps between two probes.
        rows: length -> rows of that length.
        depth_buckets: parts of a row that are told apart.
    """

    name: str
    every: int
    rows: dict[int, list[Row]]
    depth_buckets: int

    def due(self, step: int, last: int) -> bool:
        """Whether to ask after optimizer step `step` of `last`."""
        return step % self.every == 0 or step == last


def draw(source: Rows, rows: int) -> list[Row]:
    """The first rows of a source.

    Raises:
        ValueError: none of them has a label.
    """
    drawn = [source.row(i) for i in range(rows)]
    if all((row["labels"][1:] == IGNORE).all() for row in drawn):
        raise ValueError(f"none of its first {rows} rows has a label: there is nothing to ask")
    return drawn


def buckets(ids: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """(T,) int64: of each label the part of the row where its answer stands, from 0, or `ANYWHERE`."""
    found = np.full(len(ids), ANYWHERE, np.int64)
    for t in np.flatnonzero(labels != IGNORE):
        if t < 2:
            continue
        before = np.flatnonzero((ids[: t - 1] == ids[t - 1]) & (ids[1:t] == labels[t]))
        if before.size:
            found[t] = min(parts - 1, int(before[-1]) * parts // (int(t) - 1))
    return found


class Probes(TrainerCallback):
    """Asks after the optimizer steps for which a probe is due."""

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
        """Log the figures of the probes that are due; training's own log and clock stay as they are."""
        due = [p for p in self.probes if p.due(state.global_step, state.max_steps)]
        if due:
            with self.clock_stopped():
                wanted = control.should_log
                for probe in due:
                    self.trainer.log(ask(self.trainer, probe))
                control.should_log = wanted  # which `log` took as answered


@torch.no_grad()
def ask(trainer: Trainer, probe: Probe) -> dict[str, float]:
    """The share of labels that have the largest logit: in all, by length, and by length and depth."""
    counts = {
        length: _count(trainer, rows, probe.depth_buckets) for length, rows in probe.rows.items()
    }
    return figures(f"eval_{probe.name}_accuracy", counts)


def figures(prefix: str, counts: dict[int, torch.Tensor]) -> dict[str, float]:
    """Counts (parts + 1, 2) of right and asked by length -> what is logged, less empty buckets."""
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
    """(parts + 1, 2): labels met and asked in each part; the last row is of those without a depth."""
    counts = torch.zeros(parts + 1, 2, dtype=torch.int64)
    model: Any = trainer.model  # sharded where it is sharded, and not compiled for our lengths
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
    """This process's rows; every process gets as many batches, as a sharded model wants."""
    size, world = trainer.args.per_device_eval_batch_size, trainer.args.world_size
    filled = [*rows, *[silent(rows[0])] * (-len(rows) % world)]
    mine = filled[trainer.args.process_index :: world]
    for start in range(0, len(mine), size):
        yield mine[start : start + size]


def _met(trainer: Trainer, model: nn.Module, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(B, T - 1) bool, twice: whether label t + 1 has the largest logit at t, and is asked for."""
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
