"""Options that a family cannot express: compare a model with its export read back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid.config.hybrid_config import HybridConfig
from hybrid.convert.family import Family
from hybrid.convert.stack import Block, Part, blocks, mtp_blocks
from hybrid.modeling.model import HybridForCausalLM

# Our keys that a converted model need not share: they affect only training or names.
TOP_UNCOMPARED = {
    "layout", "num_hidden_layers", "ffn", "mixers", "feed_forwards", "init", "initializer_range",
    "use_cache", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    "imported_from",
    "z_loss", "loss_backend", "mtp_layout", "mtp_loss_weight", "canon_width",
    "norm_position", "residuals", "canon", "shared",  # compared layer by layer
}  # fmt: skip
UNCOMPARED = {
    "dropout", "dt_min", "dt_max", "dt_floor", "a_range", "expand", "bias_update_rate",
    "balance_loss", "balance_statistics", "sequence_balance_loss", "router_z_loss",
}  # fmt: skip
# Options without effect unless another one is set: (option, part, its neutral value).
MOOT = (
    ("group_score", "num_groups", 1),
    ("top_k_groups", "num_groups", 1),
    ("shared_intermediate_size", "num_shared_experts", 0),
    ("qk_norm_type", "qk_norm", None),
    ("qk_norm_eps", "qk_norm", None),
    ("gate_bias", "output_gate", False),
    ("lower_bound", "decay_gate", "softplus"),
    ("temperature_length", "temperature", None),
    ("temperature_offset", "temperature", None),
    ("dual_chunk_window", "dual_chunk_size", None),
)


def differences(family: Family, model: HybridForCausalLM, again: HybridForCausalLM) -> list[str]:
    """Return one line for each difference: the option, its layers, and the value that the family
    can express.

    Args:
        family: the family of the export.
        model: our model.
        again: the export, read back.
    """
    stack, other = blocks(model, family.literal), blocks(again, family.literal)
    ahead, their_ahead = (mtp_blocks(each, family.literal) for each in (model, again))
    lines = []
    uncompared = set(TOP_UNCOMPARED)
    if not any(len(block.mixers) > 1 for block in stack):
        uncompared.add("parallel_combine")
    for name in inspect.get_annotations(HybridConfig):
        ours, theirs = getattr(model.config, name), getattr(again.config, name)
        if name not in uncompared and ours != theirs:
            lines.append(f"{name}: {ours!r} here, {family.name} can only say {theirs!r}")
    if len(stack) != len(other):
        lines.append(f"{len(stack)} layers here, {family.name} can only have {len(other)}")
    lines += _in_stack(family, stack, other)
    for module, theirs in zip(ahead[:1], their_ahead, strict=False):  # all are alike
        if len(module) != len(theirs):
            have = f"{family.name} can only have {len(theirs)}"
            lines.append(f"the MTP modules: {len(module)} layers here, {have}")
        lines += [f"of the MTP modules: {line}" for line in _in_stack(family, module, theirs)]
    return lines


def _in_stack(family: Family, ours: Sequence[Block], theirs: Sequence[Block]) -> list[str]:
    """Return one line for each option, with the layers that it concerns."""
    layers: dict[str, list[int]] = {}
    for block, other in zip(ours, theirs, strict=False):
        for layer, line in _in_block(family, block, other):
            layers.setdefault(line, []).append(layer)
    return by_layers(layers)


LAYERS = "{layers}"


def _in_block(family: Family, ours: Block, theirs: Block) -> Iterator[tuple[int, str]]:
    """Yield (layer, line) for one block.

    ``{layers}`` is a placeholder for all layers with the same line.
    """
    count = max(len(ours.mixers), len(theirs.mixers))
    pad: tuple[Part | None, ...] = (None,) * count
    pairs = zip((*ours.mixers, *pad)[:count], (*theirs.mixers, *pad)[:count], strict=True)
    for part, other in pairs:
        for line in _in_part(family, "mixers", part, other):
            yield ours.mixer_layer, line
    for line in _in_part(family, "feed_forwards", ours.ffn, theirs.ffn):
        yield ours.ffn_layer, line


def _in_part(family: Family, field: str, part: Part | None, other: Part | None) -> Iterator[str]:
    if part is None and other is None:
        return
    if part is None or other is None or part.name != other.name:
        here = (
            f"{part.letter} ({part.name})" if part else f"no {field.rstrip('s').replace('_', '-')}"
        )
        there = other.name if other else "nothing"
        yield f"{LAYERS}: {here} here, {family.name} can only have {there}"
        return
    name = f"{field}.{part.letter}"
    mine, yours = comparable(part), comparable(other)
    known = mine.keys() & yours.keys()  # options on one side only follow from another difference
    ours = {f"{name}.{key}": mine[key] for key in known} | part.around
    theirs = {f"{name}.{key}": yours[key] for key in known} | respelt(other, part.letter)
    for path in sorted(ours.keys() | theirs.keys()):
        value, said = ours.get(path), theirs.get(path)
        if value != said:
            yield f"{path}: {value!r} here ({LAYERS}), {family.name} can only say {said!r}"


def by_layers(found: Mapping[str, list[int]]) -> list[str]:
    """Fill ``{layers}`` in each line with the layers that share it."""
    return [line.replace(LAYERS, _ranges(layers)) for line, layers in found.items()]


def _ranges(layers: list[int]) -> str:
    """Format layer indices: [0, 1, 2, 5] -> 'layers 0-2, 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def respelt(part: Part, letter: str) -> dict[str, Any]:
    """Return the block options of a part, under another letter."""
    return {
        ".".join([setting, letter, *rest]): value
        for path, value in part.around.items()
        for setting, _, *rest in [path.split(".")]
    }


def comparable(part: Part) -> dict[str, Any]:
    """Return the options of a part that affect its computation, in a canonical form."""
    options = dict(vars(part.options))
    if hasattr(part.options, "has_correction_bias"):
        options["score_correction_bias"] = part.options.has_correction_bias
    if hasattr(part.options, "scaling"):
        options["scale"] = part.options.scaling
    for name, governs, neutral in MOOT:
        if options.get(governs) == neutral:
            options.pop(name, None)
    if options.get("scale", 0) is None and options.get("head_dim"):
        options["scale"] = options["head_dim"] ** -0.5
    if options.get("rope_parameters") is not None:
        options["rope_parameters"] = _plain_rope(options["rope_parameters"])
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if name not in UNCOMPARED
    }


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"rope_type": rope.get("type", "default"), "rope_theta": 10000.0, **rope}
    plain.pop("type", None)
    if plain.get("partial_rotary_factor") == 1.0:
        del plain["partial_rotary_factor"]
    return plain
