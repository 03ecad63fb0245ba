"""Keeping the load of experts even: losses, and the loss-free bias.

A training forward hands what its routers decided to `observe`, which counts the tokens of each expert
and returns what is added to the loss. After each optimizer step `finish_step` moves the biases and
starts the counts anew. `hybrid.train` calls it; a training loop of your own calls it itself.

Shapes: B batch, T time, E experts, k experts of a token. Padding counts nowhere.
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
    """What one router decided in one forward.

    Attributes:
        router: which one.
        logits: (B, T, E) float32, with their graph.
        counts: (B, E) float32, choices of each expert in each row.
        mask: (B, T) float32, 0 at padding.
    """

    router: Router
    logits: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by name, in the order in which tokens meet them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Router)}


def observe(
    model: nn.Module,
    logits: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """Count the load of a forward, and return the sum of all layers' balance losses.

    With `balance_statistics: global` this is a collective call: every process makes it as often.
    Its load is that of the tokens since the last `finish_step`, so that under gradient accumulation
    the last forward sees the whole batch and earlier ones what came so far (arXiv 2501.11873).

    Args:
        model: whose routers they are.
        logits: (B * T, E) for each router.
        indices: (B * T, k) for each router.
        mask: (B, T), 0 at padding.

    Returns:
        float32 scalar, a mean over this process's tokens; weighted by tokens, its mean over processes
        is the loss of the union of their batches.
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
    """Choices (B * T, k) -> tokens of each expert in each row (B, E)."""
    chosen = indices.view(len(mask), -1)
    counts = mask.new_zeros(len(mask), router.options.num_experts)
    return counts.scatter_add(1, chosen, mask.repeat_interleave(indices.shape[-1], dim=1))


def _layer_loss(layer: Decisions, load: torch.Tensor) -> torch.Tensor:
    """The losses that this router's options ask for; `load` (E,) gives the shares f."""
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
    """E * sum_i f_i P_i (arXiv 2101.03961, eq. 4): load and mean probabilities (..., E) -> (...).

    1 where both are even. The gradient flows through P alone; counts have none.
    """
    shares = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    return load.shape[-1] * (shares * probabilities).sum(dim=-1)


def share_of_batch(targets: torch.Tensor, items: torch.Tensor | int | None) -> torch.Tensor | float:
    """What part of an optimizer step's targets this forward has; 1 where the step is not known.

    The cross entropy of transformers' `Trainer` is a sum over targets divided by those of the whole
    step. Balance losses are means, and have to be given this weight to be counted once.

    Args:
        targets: labels, -100 where there is none.
        items: `num_items_in_batch`.
    """
    return 1.0 if items is None else (targets != -100).sum() / items


@torch.no_grad()
def finish_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """To be called once after each optimizer step, by every process: move biases, clear the counts.

    b_i <- b_i + gamma * sign(mean load - load_i)   (arXiv 2408.15664, algorithm 1)

    Returns:
        Tokens of each expert in this step, all processes together, (E,) by the router's name; empty
        where no forward was observed.
    """
    found = {n: r for n, r in routers(model).items() if r.load is not None}
    loads = _over_processes([r.load for r in found.values() if r.load is not None])
    for router, load in zip(found.values(), loads, strict=True):
        gamma = router.options.bias_update_rate
        if gamma > 0 and isinstance(router, BiasedRouter):
            router.score_correction_bias.add_((load.mean() - load).sign(), alpha=gamma)
        router.load = None
    return dict(zip(found, loads, strict=True))


def _over_processes(loads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Each load summed over all processes, in one collective call."""
    present = [x for x in loads if x is not None]
    if not present or not (dist.is_available() and dist.is_initialized()):
        return present
    together = torch.cat(present)
    dist.all_reduce(together)
    return list(together.split([len(x) for x in present]))
