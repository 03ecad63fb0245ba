"""Search by gates: one learnt number a layer, under a penalty on the budget.

Every layer outputs g * softmax + (1 - g) * linear, with g a sample of the hard concrete distribution
(Louizos et al., arXiv 1712.01312, section 2.2): with u uniform in (0, 1) and a the learnt logit,

    s = sigmoid((log u - log(1 - u) + a) / tau),   g = clip((zeta - gamma) s + gamma, 0, 1)
    P(g > 0) = sigmoid(a - tau log(-gamma / zeta))                                     (eq. 12)

The penalty is penalty * max(0, E / B - 1), E the expected cost sum_i P(g_i > 0) c_i and B the budget,
in softmax layers (c_i = 1) or in bytes that they add to the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hybrid.search.bench import Bench, Proposals
from hybrid.search.learning import GATES, LearnChoices, learn
from hybrid.search.placement import Space
from hybrid.search.report import Table

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched interval."""

START = 2.0
"""Initial logit: P(g > 0) = 0.98, close to the teacher."""


def sample(logits: torch.Tensor, tau: float, generator: torch.Generator) -> torch.Tensor:
    """Return samples g in [0, 1] of the hard concrete distribution, with gradients (eq. 10)."""
    eps = torch.finfo(torch.float32).eps
    u = torch.rand(logits.shape, generator=generator).clamp(eps, 1 - eps).to(logits)
    s = torch.sigmoid((u.log() - (-u).log1p() + logits) / tau)
    return ((ZETA - GAMMA) * s + GAMMA).clamp(0, 1)


def probability(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Return P(g > 0) (eq. 12)."""
    return torch.sigmoid(logits - tau * math.log(-GAMMA / ZETA))


def costs(space: Space) -> tuple[torch.Tensor, float]:
    """Return what each searched layer costs if it stays, and what all may cost together."""
    if space.most_bytes is None:
        assert space.most_layers is not None
        return torch.ones(len(space.layers)), float(space.most_layers)
    added = [float(softmax - linear) for softmax, linear in space.layer_bytes.values()]
    return torch.tensor(added), float(max(1, space.most_bytes - space.cache_bytes(frozenset())))


class LearnGates(LearnChoices):
    """Distillation with a learnt gate in every searched layer.

    Args:
        space: the placements.
        penalty: factor of the penalty.
        tau: temperature of the samples.
        gate_learning_rate: of the gates; it follows the schedule of the run.
        gates: their logits.
        kwargs: arguments of ``LearnChoices``.
    """

    def __init__(
        self,
        *,
        space: Space,
        penalty: float,
        tau: float,
        gate_learning_rate: float,
        gates: nn.Parameter,
        **kwargs: Any,
    ) -> None:
        super().__init__(gates=gates, **kwargs)
        self.logits, self.penalty, self.tau = gates.requires_grad_(True), penalty, tau
        self.gate_learning_rate = gate_learning_rate
        self.costs, self.budget = costs(space)

    def draw(self) -> torch.Tensor:
        """Draw the gates of this step, and return the penalty."""
        drawn = sample(self.logits, self.tau, self.generator())
        for choice, gate in zip(self.choices.values(), drawn, strict=True):
            choice.gate = gate.to(next(choice.parameters()))
        expected = (probability(self.logits, self.tau) * self.costs).sum()
        return self.penalty * (expected / self.budget - 1).clamp(min=0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As ``HybridTrainer``, with the gates in a group of their own, without weight decay."""
        created = self.optimizer is None
        self.logits.requires_grad_(not created)  # not in a group of the others
        optimizer = super().create_optimizer(model)
        if created:
            self.logits.requires_grad_(True)
            group = {"params": [self.logits], "lr": self.gate_learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
        return optimizer


def propose(bench: Bench, proposals: Proposals) -> list[Table]:
    """Learn the gates, and propose the layers with the largest ones."""
    options, space, models = bench.config.gates, bench.space, bench.scorer.models
    supernet = models.supernet()
    choices = models.choices(supernet)
    logits = nn.Parameter(torch.full((len(space.layers),), START, device=supernet.device))
    supernet.register_parameter(GATES, logits)
    trainer = partial(
        LearnGates,
        space=space,
        penalty=options.penalty,
        tau=options.temperature_of_gates,
        gate_learning_rate=options.learning_rate,
        gates=logits,
        **bench.learning(options, choices),
    )
    learnt = learn(bench.training("gates"), supernet, trainer)[GATES]
    values = dict(zip(space.layers, learnt.tolist(), strict=True))
    order = sorted(values, key=lambda i: values[i], reverse=True)
    for count in bench.counts:
        proposals.add("gates", space.first(order, count))
    return [table(values, options.temperature_of_gates)]


def table(logits: Mapping[int, float], tau: float) -> Table:
    """Return the learnt gates as title, text, headings and rows of a table."""
    values = probability(torch.tensor(list(logits.values())), tau).tolist()
    rows = [
        [str(i), f"{logit:.3f}", f"{value:.3f}"]
        for (i, logit), value in zip(logits.items(), values, strict=True)
    ]
    return "Gates", "Larger: the layer should stay softmax.", ["layer", "logit", "P(g > 0)"], rows
