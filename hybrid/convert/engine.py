"""The engine that reads a family's map: their names to ours, and back.

A family is a config mapping and a list of name pairs. A pair holds `{i}` where the layer index goes;
the same list is read in both directions, so what converts one way converts back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybrid.config import HybridConfig
from hybrid.model import HybridForCausalLM
from hybrid.options import did_you_mean


@dataclass(frozen=True)
class Family:
    """One published architecture.

    Attributes:
        model_type: transformers' name for it.
        config: their config -> the keyword arguments of HybridConfig. Raises ValueError naming the
            option that this package cannot express.
        names: (theirs, ours) pairs of parameter names, `{i}` for the layer index.
    """

    model_type: str
    config: Callable[[Any], dict[str, Any]]
    names: tuple[tuple[str, str], ...]

    def rename(self, theirs: str) -> str | None:
        """Our name of one of their parameters, or None where the map has none."""
        for pattern, ours in self.names:
            match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), theirs)
            if match:
                return ours.replace("{i}", match[1]) if match.groups() else ours
        return None


families: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family; refuses a second one for the same model type."""
    if family.model_type in families:
        raise ValueError(f"the family {family.model_type!r} is registered already")
    families[family.model_type] = family
    return family


def from_published(source: str | PreTrainedModel, **kwargs: Any) -> HybridForCausalLM:
    """Read a published model's weights into a hybrid of the equal layout.

    Args:
        source: a model of transformers, or the path or hub name of one.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `gguf_file` or `dtype`.

    Raises:
        ValueError: a family without a map, an option that cannot be expressed, or weights whose
            names or shapes do not fit; each is named.
    """
    theirs = source
    if isinstance(source, str):
        theirs = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    kind = theirs.config.model_type
    if kind not in families:
        raise ValueError(f"no map for the family {kind!r}, {did_you_mean(kind, families)}")
    family = families[kind]
    generation = theirs.generation_config
    config = HybridConfig(**family.config(theirs.config))
    with torch.device("meta"):
        ours = HybridForCausalLM(config)
    weights = _renamed(family, theirs.state_dict())
    _check_shapes(weights, ours)
    # buffers outside the state dict (rotary frequencies, decays) are functions of the config
    ours.to_empty(device=theirs.device)
    ours.load_state_dict(weights, strict=True, assign=True)
    ours.tie_weights()
    for module in ours.modules():
        if not list(module.parameters(recurse=False)):
            ours._init_weights(module)
    ours.generation_config = generation
    return ours.eval()


def _renamed(family: Family, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    left_over = []
    for theirs, tensor in weights.items():
        ours = family.rename(theirs)
        if ours is None:
            left_over.append(theirs)
        else:
            renamed[ours] = tensor
    if left_over:
        raise ValueError(
            f"the map of {family.model_type!r} has no place for {_some(left_over)}; the checkpoint"
            " may be of a variant of that family"
        )
    return renamed


def _check_shapes(weights: Mapping[str, torch.Tensor], model: HybridForCausalLM) -> None:
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise ValueError(f"the checkpoint has no weights for {_some(missing)}")
    for name, tensor in weights.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            expected = tuple(wanted[name].shape) if name in wanted else "no such weight"
            raise ValueError(f"{name}: expected {expected}, found {tuple(tensor.shape)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
