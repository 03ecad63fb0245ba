"""Which parameters decay, and Muon beside AdamW as one optimizer.

No weight decay on: anything that is not a matrix (biases, norms, gate and decay vectors),
embeddings, and parameters that their module names in `no_weight_decay` (a tuple of names, or a
method that returns one; e.g. the projection of a decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import nn


def decaying(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to."""
    exempt: set[int] = set()
    for module in model.modules():
        names = _declared(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, nn.Embedding) or name in names:
                # By identity: a tied output head is the embedding.
                exempt.add(id(parameter))
    return [name for name, parameter in model.named_parameters() if id(parameter) not in exempt]


def _declared(module: Any) -> set[str]:
    names = getattr(module, "no_weight_decay", ())
    return set(names if isinstance(names, (tuple, list, set, frozenset)) else names())


def matrices(model: nn.Module) -> list[str]:
    """Names of the parameters that Muon is for: decaying matrices that are not the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    by_name = dict(model.named_parameters())
    return [n for n in decaying(model) if by_name[n].ndim == 2 and id(by_name[n]) not in head_ids]


class Group(TypedDict):
    """A parameter group as torch's optimizers take it."""

    params: list[nn.Parameter]
    weight_decay: float


def groups(model: nn.Module, names: Iterable[str], weight_decay: float) -> list[Group]:
    """The trainable parameters of these names in at most two groups: with decay, and without."""
    chosen, decay = set(names), set(decaying(model))
    sides: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in chosen:
            sides[name not in decay].append(parameter)
    rates = (weight_decay, 0.0)
    return [
        {"params": side, "weight_decay": rate}
        for side, rate in zip(sides, rates, strict=True)
        if side
    ]


class Several(torch.optim.Optimizer):
    """Optimizers over disjoint parameters as one.

    The inner optimizers work on this one's own groups and state, so schedulers, accelerate's sharding
    and checkpoints, which know nothing of them, see a plain optimizer.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for optimizer in self.optimizers:
            stop = start + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[start:stop]
            optimizer.state = self.state
            start = stop

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each, in order."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()
