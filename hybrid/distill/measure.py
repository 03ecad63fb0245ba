"""Evaluation of a distillation: held-out loss, the error of each new mixer, and knock-outs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from hybrid.data.collate import RowCollator
from hybrid.data.packing import Row
from hybrid.distill.parts import mix_as_seen, relative_error, silenced, watch
from hybrid.modeling.losses import next_tokens
from hybrid.modeling.model import HybridForCausalLM

IDLE = 1e-3
"""Nats per token: a mixer whose knock-out increases the loss by less counts as idle."""


@dataclass(frozen=True)
class RowLosses:
    """Loss of each row, summed over its tokens, and the number of tokens."""

    sums: torch.Tensor
    counts: torch.Tensor

    @property
    def mean(self) -> float:
        """Return the mean in nats per token."""
        return (self.sums.sum() / self.counts.sum()).item()

    def above(self, other: RowLosses) -> tuple[float, float | None]:
        """Return the difference to another mean on the same rows, and its standard error.

        The error is None for a single row.
        """
        difference = self.sums - other.sums
        mean = difference.sum() / self.counts.sum()
        if len(difference) < 2:
            return mean.item(), None
        rest = difference - mean * self.counts
        error = rest.square().sum() * len(rest) / (len(rest) - 1)
        return mean.item(), (error.sqrt() / self.counts.sum()).item()


@dataclass(frozen=True)
class Branch:
    """Knock-out of one or several mixers, with the outputs set to zero.

    Attributes:
        name: ``layer 3``, or the group of layers.
        mixer: letter and name, as ``D gated_delta_net``.
        replaced: whether it is new in the student.
        loss: loss without it, in nats per token.
        increase: increase of the loss.
        standard_error: standard error of the increase over rows; None for a single row.
    """

    name: str
    mixer: str
    replaced: bool
    loss: float
    increase: float
    standard_error: float | None

    @property
    def idle(self) -> bool:
        """Return whether the increase is below ``IDLE`` or within two standard errors."""
        return self.increase < max(IDLE, 2 * (self.standard_error or 0.0))


@torch.no_grad()
def row_losses(model: HybridForCausalLM, rows: Sequence[Row], show: bool = False) -> RowLosses:
    """Return the language-modelling loss of each row."""
    device = model.device
    sums, counts = [], []
    for row in tqdm(rows, desc="evaluate", disable=not show, leave=False):
        inputs = {key: value.to(device) for key, value in RowCollator()([row]).items()}
        predicted = int((next_tokens(inputs["labels"]) >= 0).sum())
        loss = model(**inputs, use_cache=False, skip_logits=True).loss
        sums.append(loss.double().cpu() * predicted)
        counts.append(predicted)
    return RowLosses(torch.stack(sums), torch.tensor(counts, dtype=torch.float64))


@torch.no_grad()
def output_errors(
    teacher: HybridForCausalLM,
    student: HybridForCausalLM,
    layers: Sequence[int],
    rows: Sequence[Row],
) -> dict[int, float]:
    """Return the relative squared error of each new mixer on the teacher's inputs, averaged over
    rows.
    """
    errors: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
    for row in rows:
        inputs = {k: v.to(teacher.device) for k, v in RowCollator()([row]).items() if k != "labels"}
        for i, seen in watch(teacher, layers, inputs).items():
            errors[i].append(relative_error(mix_as_seen(student, i, seen), seen.y))
    return {i: torch.stack(found).mean().item() for i, found in errors.items()}


def knock_outs(
    model: HybridForCausalLM,
    replaced: Sequence[int],
    rows: Sequence[Row],
    whole: RowLosses,
    show: bool = False,
) -> list[Branch]:
    """Return the loss without each mixer, without all new ones, and without all others.

    Args:
        model: the student.
        replaced: its layers with new mixers.
        rows: rows for the loss.
        whole: losses of these rows with all mixers.
        show: whether to show a progress bar.
    """
    mixing = [i for i, layer in enumerate(model.config.layers) if layer.mixers]
    kept = [i for i in mixing if i not in replaced]
    groups: list[tuple[str, list[int]]] = [(f"layer {i}", [i]) for i in mixing]
    groups += [
        (f"all {len(g)} {n}", g) for n, g in (("replaced", list(replaced)), ("kept", kept)) if g
    ]
    found = []
    for name, layers in tqdm(groups, desc="knock out", disable=not show, leave=False):
        with silenced(model, layers):
            losses = row_losses(model, rows)
        increase, error = losses.above(whole)
        found.append(
            Branch(
                name,
                _mixers(model, layers),
                set(layers) <= set(replaced),
                losses.mean,
                increase,
                error,
            )
        )
    return found


def _mixers(model: Any, layers: Sequence[int]) -> str:
    letters = dict.fromkeys("".join(model.config.layers[i].mixers) for i in layers)
    return ", ".join(
        f"{word} {' + '.join(model.config.stack.mixers[s].cls.name for s in word)}"
        for word in letters
    )
