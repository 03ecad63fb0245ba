"""Training of a supernet: the linear mixers learn from the teacher while every layer draws its mixer.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hybrid.distill.config import PARTS
from hybrid.distill.stages import Batch, MatchLogits
from hybrid.modeling.model import HybridForCausalLM
from hybrid.search.models import Choice, LinearMixers
from hybrid.train import TrainConfig, run
from hybrid.train.runner import RESULT

WEIGHTS = "mixers.safetensors"
"""What is trained: the linear mixers, and gates. All else is the teacher's."""

GATES = "gates"


class LearnChoices(MatchLogits):
    """Distillation of a supernet from the teacher whose modules it shares.

    Only the linear mixers, and ``gates`` if there are any, are trained. Checkpoints hold these alone.

    Args:
        choices: the choice of every searched layer.
        gates: logits of the gates, one for each searched layer; None for drawn mixers.
        seed: of what is drawn in each step.
        kwargs: arguments of ``MatchLogits``; ``replaced`` are the searched layers.
    """

    def __init__(
        self,
        *,
        choices: Mapping[int, Choice],
        gates: nn.Parameter | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(freeze=[part for part in PARTS if part != "replaced"], **kwargs)
        self.choices, self.gates, self.seed = dict(choices), gates, seed
        for choice in self.choices.values():
            choice.branches[0].requires_grad_(False)
            choice.branches[1].requires_grad_(True)

    def draw(self) -> torch.Tensor:
        """Draw the choices of this step, and return what is added to the loss, a scalar."""
        raise NotImplementedError

    def generator(self) -> torch.Generator:
        """Return a generator of seed and step alone, so that a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the KL divergence of the drawn model from the teacher, with the penalty of ``draw``."""
        added = self.draw() / self.current_gradient_accumulation_steps
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss + added.to(loss.device)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def targets(self, inputs: Batch) -> torch.Tensor:
        """As ``MatchLogits``; the shared modules are in evaluation mode meanwhile."""
        training = self.student.training
        self.teacher.eval()
        try:
            return super().targets(inputs)
        finally:
            self.student.train(training)

    def trained(self) -> dict[str, torch.Tensor]:
        """Return name -> tensor of all that is trained."""
        found = {
            f"{i}.{name}": tensor
            for i, choice in self.choices.items()
            for name, tensor in choice.branches[1].state_dict().items()
        }
        return found | ({} if self.gates is None else {GATES: self.gates.detach()})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous().cpu() for n, t in self.trained().items()}, folder / WEIGHTS)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, tensor in self.trained().items():
            tensor.copy_(stored[name])


def learn(
    settings: TrainConfig, supernet: HybridForCausalLM, trainer: Callable[..., LearnChoices]
) -> dict[str, torch.Tensor]:
    """Train a supernet, or continue; return all that is trained, from its file.

    Args:
        settings: the run, whose ``model`` is replaced by the supernet.
        supernet: the model.
        trainer: ``LearnChoices`` with all arguments but those of the run.
    """
    folder = Path(str(settings.training["output_dir"]))
    if not (folder / RESULT).is_file():

        def make(**kwargs: Any) -> LearnChoices:
            return trainer(**{**kwargs, "model": supernet})

        run(settings, make)
    return load_file(folder / WEIGHTS)


@torch.no_grad()
def load_mixers(mixers: LinearMixers, stored: Mapping[str, torch.Tensor]) -> LinearMixers:
    """Load trained weights into linear mixers; return them."""
    for i, mixer in mixers.items():
        start = f"{i}."
        own = {n.removeprefix(start): t for n, t in stored.items() if n.startswith(start)}
        mixer.load_state_dict(own)
    return mixers
