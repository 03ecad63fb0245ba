"""Trainers of the stages: ``HybridTrainer`` with other losses and frozen parts.

Shapes: B batch, T time, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from hybrid.data.collate import RowCollator
from hybrid.distill.parts import hold_still, mix_as_seen, relative_error, watch
from hybrid.distill.solve import Equations
from hybrid.modeling.losses import next_tokens
from hybrid.modeling.model import HybridForCausalLM
from hybrid.train.trainer import HybridTrainer

Batch = dict[str, torch.Tensor]
CHUNK = 256
"""Number of tokens whose logits are in memory at the same time."""
HIDDEN_ONLY = {"use_cache": False, "skip_logits": True, "output_last_hidden_state": True}
"""Keywords of a forward pass without logits."""


class LanguageModelling(HybridTrainer):
    """Stage 3: language modelling, with some parts of the student frozen.

    Args:
        replaced: layers with new mixers.
        freeze: parts without gradient.
        kwargs: arguments of ``HybridTrainer``.
    """

    def __init__(self, *, replaced: Sequence[int], freeze: Sequence[str], **kwargs: Any) -> None:
        hold_still(kwargs["model"], replaced, freeze)
        super().__init__(**kwargs)
        self.replaced = tuple(replaced)

    @property
    def student(self) -> HybridForCausalLM:
        """Return the model without accelerate's wrappers."""
        student: Any = self.accelerator.unwrap_model(self.model)
        return student


class MatchOutputs(LanguageModelling):
    """Stage 1: the mean over layers of the relative squared error of each new mixer's output.

    All mixers read the inputs of the teacher's mixers, so all are trained in one forward pass of
    the teacher (MOHAWK, arXiv 2408.10189, stage 1 and 2; LoLCATs, arXiv 2410.10254, eq. 4). The
    error of a layer is relative to the size of the output, so that all layers have similar weight.

    Args:
        teacher: the teacher, on any device.
        solve_rows: rows for the least-squares solution of the output projections before the first
            step.
        kwargs: arguments of ``LanguageModelling``.
    """

    def __init__(self, *, teacher: Any, solve_rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher: HybridForCausalLM = teacher.to(self.args.device)
        self.solve_rows = solve_rows

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As ``Trainer``; a new run first solves the output projections."""
        if resume_from_checkpoint is None and self.solve_rows:
            self.solve()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @torch.no_grad()
    def solve(self) -> None:
        """Solve the output projections by least squares, on the last rows of the training data."""
        student = self.student
        cast(nn.Module, student).to(self.args.device)
        equations = {i: Equations() for i in self.replaced}
        for inputs in self._solve_batches():
            for i, seen in watch(self.teacher, self.replaced, inputs).items():
                with equations[i].reading(student.model.layers[i].mixer):
                    mix_as_seen(student, i, seen)
                equations[i].add(seen.y)
        for i in self.replaced:
            equations[i].solve(student.model.layers[i].mixer)

    def _solve_batches(self) -> Iterator[Batch]:
        rows, size = self.train_dataset, self.args.train_batch_size
        total: int = len(rows)  # pyright: ignore[reportArgumentType]
        chosen = range(max(0, total - self.solve_rows), total)
        starts = range(0, len(chosen), size)
        for start in tqdm(starts, desc="solve", disable=self.args.disable_tqdm):
            batch = RowCollator()([rows[i] for i in chosen[start : start + size]])  # pyright: ignore
            inputs: Any = self._prepare_inputs(batch)
            yield {key: value for key, value in inputs.items() if key != "labels"}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the mean relative error; there are no other outputs."""
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        errors = [
            relative_error(mix_as_seen(self.student, i, seen), seen.y)
            for i, seen in watch(self.teacher, self.replaced, inputs).items()
        ]
        loss = torch.stack(errors).mean() / self.current_gradient_accumulation_steps
        return (loss, {}) if return_outputs else loss


class MatchLogits(LanguageModelling):
    """Stage 2: the KL divergence of the student from the teacher, per predicted token.

    tau^2 * KL(softmax(z_teacher / tau) || softmax(z_student / tau)), z the logits, tau the
    temperature (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        teacher: the teacher, on any device.
        temperature: tau.
        kwargs: arguments of ``LanguageModelling``.
    """

    def __init__(self, *, teacher: Any, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher: HybridForCausalLM = teacher.to(self.args.device)
        self.temperature = temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the KL divergence over the positions with a next token."""
        inputs = dict(inputs)
        predicted = next_tokens(inputs.pop("labels")).flatten() >= 0
        wanted = self.targets(inputs)
        found = model(**inputs, **HIDDEN_ONLY).last_hidden_state
        loss = divergence(
            self.student,
            self.teacher,
            found.flatten(0, 1)[predicted],
            wanted.flatten(0, 1)[predicted],
            self.temperature,
        )
        count = predicted.sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / count
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def targets(self, inputs: Batch) -> torch.Tensor:
        """Return the teacher's hidden states before the head, (B, T, D)."""
        return self.teacher(**inputs, **HIDDEN_ONLY).last_hidden_state


def divergence(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    found: torch.Tensor,
    wanted: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return KL(teacher || student) times temperature^2, summed over tokens, in nats.

    The logits of ``CHUNK`` tokens are in memory at the same time; the backward recomputes the
    student's.

    Args:
        student, teacher: models whose heads are used.
        found, wanted: hidden states of student and teacher before the head, (N, D).
        temperature: divisor of both logits.
    """

    def piece(h: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        ours = F.log_softmax(student.compute_logits(h).float() / temperature, dim=-1)
        with torch.no_grad():
            theirs = F.log_softmax(teacher.compute_logits(g).float() / temperature, dim=-1)
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)

    pieces = zip(found.split(CHUNK), wanted.split(CHUNK), strict=True)
    total = [checkpoint(piece, h, g, use_reentrant=False) for h, g in pieces]
    return torch.stack(total).sum() * temperature**2
