"""Parameter groups: weight decay, learning rates, and Muon combined with AdamW.

By default there is no weight decay on embeddings (OLMo 2, arXiv 2501.00656), on the weights of
norms, on gates, and on all parameters that are not matrices, such as biases. Gates are the
parameters that a module lists in ``no_weight_decay`` (a tuple of names, or a method that returns
one), e.g. the projection of a decay. ``Decay`` enables weight decay for each kind.

Under muP (``mup_base_width``, ``hybrid.modeling.mup``) matrices whose width is scaled have their
own groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from hybrid.mixers.short_convolution import ShortConvolution
from hybrid.modeling.initialization import growths


@dataclass(frozen=True)
class Decay:
    """Which kinds of parameters have weight decay in addition to matrices."""

    embeddings: bool = False
    norms: bool = False
    gates: bool = False


def decaying(model: nn.Module, decay: Decay = Decay()) -> list[str]:
    """Return the names of the parameters with weight decay."""
    wanted = {"embedding": decay.embeddings, "norm": decay.norms, "gate": decay.gates}
    exempt: set[int] = set()
    for module in model.modules():
        names = _declared(module)
        for name, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, name, parameter, names)
            if not wanted.get(kind, kind == "matrix"):
                # By identity: a tied output head is the embedding.
                exempt.add(id(parameter))
    return [name for name, parameter in model.named_parameters() if id(parameter) not in exempt]


def _kind(module: nn.Module, name: str, parameter: nn.Parameter, gates: set[str]) -> str:
    """Return ``embedding``, ``norm``, ``bias``, ``gate`` or ``matrix``."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__.endswith("Norm"):
        return "norm"
    if name == "bias" or name.endswith("_bias"):
        return "bias"
    return "gate" if parameter.ndim < 2 or name in gates else "matrix"


def _declared(module: Any) -> set[str]:
    names = getattr(module, "no_weight_decay", ())
    return set(names if isinstance(names, (tuple, list, set, frozenset)) else names())


def matrices(model: nn.Module) -> list[str]:
    """Return the names of Muon's parameters: matrices with weight decay, without the output head.

    Depthwise convolutions (C, W) are excluded: each row is a filter of one channel and is not a
    linear map between channels.
    """
    others: list[nn.Module] = [m for m in model.modules() if isinstance(m, ShortConvolution)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others += [] if head is None else [head]
    exempt = {id(p) for module in others for p in module.parameters()}
    by_name = dict(model.named_parameters())
    return [n for n in decaying(model) if by_name[n].ndim == 2 and id(by_name[n]) not in exempt]


class Group(TypedDict, total=False):
    """A parameter group of torch's optimizers; ``lr`` is set if it differs from the default."""

    params: list[nn.Parameter]
    weight_decay: float
    lr: float


def groups(
    model: nn.Module,
    names: Iterable[str],
    weight_decay: float,
    *,
    decay: Decay = Decay(),
    learning_rate: float | None = None,
) -> list[Group]:
    """Return the trainable parameters of these names in groups: with decay, and without.

    With a learning rate, matrices that muP scales have groups of their own, one for each growth
    factor. Their rate is divided by the factor and their decay is multiplied by it, so that the
    product stays the same.
    """
    chosen, decays = set(names), set(decaying(model, decay))
    grown = {} if learning_rate is None else growths(model)
    sides: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in chosen:
            factor = grown[name].rate_factor if name in grown else 1.0
            sides.setdefault((name not in decays, factor), []).append(parameter)
    found = []
    for (exempt, factor), side in sorted(sides.items(), key=lambda item: item[0]):
        group = Group(params=side, weight_decay=0.0 if exempt else weight_decay / factor)
        if learning_rate is not None and factor != 1:
            group["lr"] = learning_rate * factor
        found.append(group)
    return found


class Several(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters as one optimizer.

    The inner optimizers share this object's groups and state. So schedulers, accelerate's sharding
    and checkpoints see a plain optimizer.
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
        """Run one step of each optimizer, in order."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of ``state_dict``."""
        super().load_state_dict(state_dict)
        self._share()
