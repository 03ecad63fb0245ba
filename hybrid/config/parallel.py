"""Tensor and expert parallel plans of a stack, in the form of transformers' `base_model_tp_plan`.

A mixer or a feed-forward declares how it can be split (`Split`); a plan is collected from the layers. A
rule that holds for every layer has `*` for the layer, as in transformers; in a stack of several kinds
of layers a rule names its layer, `layers.3.mixer.q_proj`. What has no rule is replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.config.spec import LayerSpec, StackSpec

EMBEDDING_RULE = ("embed_tokens", "embedding_rowwise")
"""The input embedding is split over the vocabulary, with every plan that is not empty."""


@dataclass(frozen=True)
class Split:
    """Modules that are split together, or not at all.

    Attributes:
        rules: name of a module or a parameter, below the mixer or feed-forward -> the style by
            transformers' name: `colwise`, `rowwise`, `packed_colwise`, ...; the empty name is the
            mixer or feed-forward itself.
        sizes: option -> size that the number of processes must divide.
    """

    rules: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class PlacedSplit:
    """A `Split` of one layer.

    Attributes:
        layer_idx: the layer.
        key: config path of the options: `mixers.S`, `feed_forwards.E`.
        path: module path below the layer: `mixer`, `mixer.branches.1`, `ffn`.
        rules: as in `Split`, by module path below the stack.
        sizes: as in `Split`.
    """

    layer_idx: int
    key: str
    path: str
    rules: dict[str, str]
    sizes: dict[str, int]


def tensor_splits(stack: StackSpec) -> list[PlacedSplit]:
    """What tensor parallelism splits, layer by layer."""
    return [split for layer in stack for split in _layer_splits(layer, "tensor_splits")]


def expert_splits(stack: StackSpec) -> list[PlacedSplit]:
    """What expert parallelism splits, layer by layer."""
    return [split for layer in stack for split in _layer_splits(layer, "expert_splits")]


def base_tp_plan(stack: StackSpec) -> dict[str, str] | None:
    """The plan of `tp_plan="auto"`, by names below the stack; None where no layer can be split."""
    plan = _collect(stack, tensor_splits(stack))
    return dict([EMBEDDING_RULE]) | plan if plan else None


def base_ep_plan(stack: StackSpec) -> dict[str, str] | None:
    """The plan of expert parallelism, by names below the stack; None without experts."""
    return _collect(stack, expert_splits(stack)) or None


def known_styles() -> frozenset[str]:
    """Names of the parallel styles of the installed transformers; empty without torch.distributed."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    return frozenset(ALL_PARALLEL_STYLES.keys())


def _layer_splits(layer: LayerSpec, method: str) -> Iterator[PlacedSplit]:
    """The splits that the parts of a layer declare, by `method`, in styles that transformers has."""
    if layer.shared is not None and layer.shared.lora_rank is not None:
        return  # an adapter within a projection is not split with it
    styles = known_styles()
    for part, key, path in _parts(layer):
        declare: Callable[..., Iterable[Split]] | None = getattr(part.cls, method, None)
        for split in declare(part.options) if declare is not None else ():
            rules = _rules_of_this_version(split.rules, styles)
            if styles.issuperset(rules.values()):
                root = f"layers.{layer.layer_idx}.{path}"
                named = {f"{root}.{name}" if name else root: rules[name] for name in rules}
                yield PlacedSplit(layer.layer_idx, key, path, named, split.sizes)


def _parts(layer: LayerSpec) -> Iterator[tuple[object, str, str]]:
    """Mixers and feed-forward that may be split: spec, config path, module path below the layer."""
    for i, mixer in enumerate(layer.mixers):
        path = "mixer" if len(layer.mixers) == 1 else f"mixer.branches.{i}"
        if not mixer.canon:
            yield mixer, f"mixers.{mixer.symbol}", path
    if layer.ffn is not None and "D" not in layer.canon:  # canon layers read whole channels
        yield layer.ffn, f"feed_forwards.{layer.ffn.symbol}", "ffn"


def _rules_of_this_version(rules: dict[str, str], styles: frozenset[str]) -> dict[str, str]:
    """Expert rules of transformers from 5.19 on, in the styles of those before."""
    if "ep_dispatch_experts" not in rules.values() or "ep_dispatch_experts" in styles:
        return rules
    older = {"ep_dispatch_experts": "moe_tp_experts"}
    return {"router": "ep_router"} | {name: older.get(s, s) for name, s in rules.items()}


def _collect(stack: StackSpec, splits: list[PlacedSplit]) -> dict[str, str]:
    """All rules, with `*` for the layer where each layer with such a part has the rule."""
    placed: dict[str, dict[int, str]] = {}
    for split in splits:
        for name, style in split.rules.items():
            below = name.split(".", 2)[2]
            placed.setdefault(below, {})[split.layer_idx] = style
    have = {
        "mixer": {layer.layer_idx for layer in stack if layer.mixers},
        "ffn": {layer.layer_idx for layer in stack if layer.ffn is not None},
    }
    plan = {}
    for below, styles in placed.items():
        numbered = any(piece.isdigit() for piece in below.split("."))
        everywhere = styles.keys() == have[below.split(".")[0]] and len(set(styles.values())) == 1
        if everywhere and not numbered:
            plan[f"layers.*.{below}"] = next(iter(styles.values()))
        else:
            plan |= {f"layers.{i}.{below}": style for i, style in styles.items()}
    return plan
