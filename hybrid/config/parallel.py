"""Tensor and expert parallel plans of a stack, in the form of transformers' ``base_model_tp_plan``.

A mixer or a feed-forward declares how it can be split (``Split``); a plan is collected from the
layers. A rule for every layer has ``*`` in place of the layer index, as in transformers; in a stack
of different layers a rule names its layer, ``layers.3.mixer.q_proj``. Parameters without a rule are
replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.config.spec import LayerSpec, StackSpec

EMBEDDING_RULE = ("embed_tokens", "embedding_rowwise")
"""Rule of the input embedding, split over the vocabulary; part of every non-empty plan."""


@dataclass(frozen=True)
class Split:
    """Modules that are split together or not at all.

    Attributes:
        rules: name of a module or a parameter, relative to the mixer or feed-forward -> parallel
            style, in transformers' names: ``colwise``, ``rowwise``, ``packed_colwise``, ...; the
            empty name is the mixer or feed-forward itself.
        sizes: option -> size that must be divisible by the number of processes.
    """

    rules: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class PlacedSplit:
    """A ``Split`` of one layer.

    Attributes:
        layer_idx: the layer.
        key: config path of the options: ``mixers.S``, ``feed_forwards.E``.
        path: module path relative to the layer: ``mixer``, ``mixer.branches.1``, ``ffn``.
        rules: as in ``Split``, by module path relative to the stack.
        sizes: as in ``Split``.
    """

    layer_idx: int
    key: str
    path: str
    rules: dict[str, str]
    sizes: dict[str, int]


def tensor_splits(stack: StackSpec, *, any_style: bool = False) -> list[PlacedSplit]:
    """Return the tensor parallel splits, layer by layer.

    Args:
        stack: resolved layers.
        any_style: whether to return splits in styles that the installed transformers lacks, too.
    """
    return [split for layer in stack for split in _layer_splits(layer, "tensor_splits", any_style)]


def expert_splits(stack: StackSpec) -> list[PlacedSplit]:
    """Return the expert parallel splits, layer by layer."""
    return [split for layer in stack for split in _layer_splits(layer, "expert_splits")]


def base_tp_plan(stack: StackSpec) -> dict[str, str] | None:
    """Return the plan of ``tp_plan="auto"``, by names relative to the stack; None if no layer
    splits.
    """
    plan = _collect(stack, tensor_splits(stack))
    return dict([EMBEDDING_RULE]) | plan if plan else None


def base_ep_plan(stack: StackSpec) -> dict[str, str] | None:
    """Return the expert parallel plan, by names relative to the stack; None without experts."""
    return _collect(stack, expert_splits(stack)) or None


def known_styles() -> frozenset[str]:
    """Return the parallel styles of the installed transformers; empty without torch.distributed."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    return frozenset(ALL_PARALLEL_STYLES.keys())


def _layer_splits(layer: LayerSpec, method: str, any_style: bool = False) -> Iterator[PlacedSplit]:
    """Yield the splits declared by ``method`` of the mixers and feed-forward of a layer."""
    if layer.shared is not None and layer.shared.lora_rank is not None:
        return  # adapters of shared weights are not split with their projection
    styles = known_styles()
    for part, key, path in _parts(layer):
        declare: Callable[..., Iterable[Split]] | None = getattr(part.cls, method, None)
        for split in declare(part.options) if declare is not None else ():
            rules = _rules_of_this_version(split.rules, styles)
            if any_style or styles.issuperset(rules.values()):
                root = f"layers.{layer.layer_idx}.{path}"
                named = {f"{root}.{name}" if name else root: rules[name] for name in rules}
                yield PlacedSplit(layer.layer_idx, key, path, named, split.sizes)


def _parts(layer: LayerSpec) -> Iterator[tuple[object, str, str]]:
    """Yield spec, config path and relative module path of the mixers and the feed-forward."""
    for i, mixer in enumerate(layer.mixers):
        path = "mixer" if len(layer.mixers) == 1 else f"mixer.branches.{i}"
        if not mixer.canon:
            yield mixer, f"mixers.{mixer.symbol}", path
    if layer.ffn is not None and "D" not in layer.canon:  # canon layers read all channels
        yield layer.ffn, f"feed_forwards.{layer.ffn.symbol}", "ffn"


def _rules_of_this_version(rules: dict[str, str], styles: frozenset[str]) -> dict[str, str]:
    """Translate the expert rules of transformers 5.19 and later to the styles of earlier versions."""
    if "ep_dispatch_experts" not in rules.values() or "ep_dispatch_experts" in styles:
        return rules
    older = {"ep_dispatch_experts": "moe_tp_experts"}
    return {"router": "ep_router"} | {name: older.get(s, s) for name, s in rules.items()}


def _collect(stack: StackSpec, splits: list[PlacedSplit]) -> dict[str, str]:
    """Return all rules, with ``*`` as layer index if every layer with that module has the rule."""
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
