"""Load balancing of experts: auxiliary losses, and the loss-free bias.

A training forward passes the routers' decisions to ``observe``, which counts the tokens of each
expert and returns the balance losses. After each optimizer step, ``finish_step`` updates the
biases and resets the counts. ``hybrid.train`` calls it. Call it yourself in a custom training loop.

Shapes: B batch, T time, E experts, k experts per token. Padding is never counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hybrid.ffn.router import BiasedRouter, Router


@dataclass(frozen=True)
class Decisions:
    """Decisions of one router in one forward.

    Attributes:
        router: the router.
        logits: (B, T, E) float32, with gradients.
        counts: (B, E) float32, number of choices of each expert in each row.
        mask: (B, T) float32, 0 at padding.
    """

    router: Router
    logits: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor


def routers(model: nn.Module) -> dict[str, Router]:
    """Return the routers of a model by name, in the order of the layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Router)}


def observe(
    model: nn.Module,
    logits: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """Count the load of a forward, and return the sum of all layers' balance losses.

    With ``balance_statistics: global`` this is a collective call. Every process must make the same
    number of calls. The load covers all tokens since the last ``finish_step``: with gradient
    accumulation, the last forward covers the whole batch, and earlier ones the part so far (arXiv
    2501.11873).

    Args:
        model: model with the routers.
        logits: (B * T, E) for each router.
        indices: (B * T, k) for each router.
        mask: (B, T), 0 at padding.

    Returns:
        float32 scalar, a mean over this process's tokens. The mean over processes, weighted by
        tokens, is the loss of the union of their batches.
    """
    mask = mask.to(torch.float32)
    layers = [
        Decisions(r, x.unflatten(0, mask.shape), _counts(i, r, mask), mask)
        for r, x, i in zip(routers(model).values(), logits, indices, strict=True)
    ]
    for layer in layers:
        seen = layer.counts.sum(dim=0)
        layer.router.load = seen if layer.router.load is None else layer.router.load + seen
    shared = [x for x in layers if _wants_global(x.router)]
    loads = iter(_over_processes([x.router.load for x in shared]))
    total = mask.new_zeros(())
    for layer in layers:
        load = next(loads) if _wants_global(layer.router) else layer.counts.sum(dim=0)
        total = total + _layer_loss(layer, load)
    return total


def _wants_global(router: Router) -> bool:
    return router.options.balance_loss > 0 and router.options.balance_statistics == "global"


def _counts(indices: torch.Tensor, router: Router, mask: torch.Tensor) -> torch.Tensor:
    """Count the tokens of each expert in each row, (B, E), from choices (B * T, k)."""
    chosen = indices.view(len(mask), -1)
    counts = mask.new_zeros(len(mask), router.options.num_experts)
    return counts.scatter_add(1, chosen, mask.repeat_interleave(indices.shape[-1], dim=1))


def _layer_loss(layer: Decisions, load: torch.Tensor) -> torch.Tensor:
    """Compute the losses enabled by this router's options; ``load`` (E,) determines the shares f."""
    options, mask = layer.router.options, layer.mask
    total = mask.new_zeros(())
    if options.balance_loss or options.sequence_balance_loss:
        probabilities = layer.router.probabilities(layer.logits)
        row_sums = (probabilities * mask.unsqueeze(-1)).sum(dim=1)
        tokens = mask.sum(dim=1, keepdim=True)
        if options.balance_loss:
            mean = row_sums.sum(dim=0) / tokens.sum().clamp(min=1)
            total = total + options.balance_loss * load_balance(load, mean)
        if options.sequence_balance_loss:
            rows = load_balance(layer.counts, row_sums / tokens.clamp(min=1))
            total = total + options.sequence_balance_loss * rows.mean()
    if options.router_z_loss:
        squares = layer.logits.logsumexp(dim=-1).square() * mask
        total = total + options.router_z_loss * squares.sum() / mask.sum().clamp(min=1)
    return total


def load_balance(load: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Compute the load balancing loss E * sum_i f_i P_i (arXiv 2101.03961, eq. 4).

    It is 1 if load and probabilities are uniform. Only P has gradients.

    Args:
        load: (..., E), tokens of each expert.
        probabilities: (..., E), mean probabilities of each expert.

    Returns:
        (...).
    """
    shares = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    return load.shape[-1] * (shares * probabilities).sum(dim=-1)


def share_of_batch(targets: torch.Tensor, items: torch.Tensor | int | None) -> torch.Tensor | float:
    """Return this forward's share of the targets of an optimizer step; 1 if the step is unknown.

    The cross entropy of transformers' ``Trainer`` is a sum over targets, divided by those of the
    whole step. Balance losses are means. This weight makes them count once per step.

    Args:
        targets: labels, -100 for none.
        items: ``num_items_in_batch``, or None.
    """
    return 1.0 if items is None else (targets != -100).sum() / items


@torch.no_grad()
def finish_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Update the biases and clear the counts. Call it in every process after each optimizer step.

    b_i <- b_i + gamma * sign(mean load - load_i)   (arXiv 2408.15664, algorithm 1)

    Returns:
        Tokens of each expert in this step over all processes, (E,), by router name; empty if no
        forward was observed.
    """
    observed = {n: r for n, r in routers(model).items() if r.load is not None}
    loads = _over_processes([r.load for r in observed.values() if r.load is not None])
    for router, load in zip(observed.values(), loads, strict=True):
        gamma = router.options.bias_update_rate
        if gamma > 0 and isinstance(router, BiasedRouter):
            router.score_correction_bias.add_((load.mean() - load).sign(), alpha=gamma)
        router.load = None
    return dict(zip(observed, loads, strict=True))


def _over_processes(loads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Sum each load over all processes, in one collective call."""
    present = [x for x in loads if x is not None]
    if not present or not (dist.is_available() and dist.is_initialized()):
        return present
    together = torch.cat(present)
    dist.all_reduce(together)
    return list(together.split([len(x) for x in present]))
