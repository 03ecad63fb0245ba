"""Convert configs through a family's map, in both directions, and report what cannot be expressed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hybrid.config.hybrid_config import HybridConfig
from hybrid.config.registry import mixers
from hybrid.convert.compare import LAYERS, by_layers, differences, respelt
from hybrid.convert.family import Family, Inexpressible, NotExpressible, get_family
from hybrid.convert.mtp import MTPMap
from hybrid.convert.stack import Block, Part, blocks, layout_of, mtp_blocks, on_meta
from hybrid.layout import DEFAULT
from hybrid.modeling.model import HybridForCausalLM

# Settings that can differ by letter: ``norm_position.S``, ``residuals.-.output_multiplier``.
AROUND = ("norm_position", "residuals", "canon", "shared")
# Published keys about the storage of weights, not about the computation.
QUANTIZED = ("quantization_config", "compression_config")
STORED = (*QUANTIZED, "dtype", "torch_dtype")
# The config classes build a list of this many layers before any check.
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks")
MOST_LAYERS = 100_000
# Published keys that a family need not mention.
BOOKKEEPING = {
    "use_cache", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map",
    *PreTrainedConfig().to_dict(),
}  # fmt: skip


def read_published(values: Mapping[str, Any], where: str | Path) -> tuple[Family, Any]:
    """Return the family and the published config of a config.json.

    The text config of a multimodal model.

    Args:
        values: content of the file; its dtype and quantization are ignored here (see
            ``quantized``).
        where: the file, for messages.

    Raises:
        ValueError: the family is unknown or has no map, a required ``text_config`` is missing, or
            the config class refuses a value.
    """
    if "model_type" not in values:
        raise ValueError(f"{where}: no model_type, so the family is unknown")
    family = get_family(str(values["model_type"]), values.get("architectures"))
    if values["model_type"] in family.wrapped_in:
        # the outer config may have keys that the inner one lacks, such as whether weights are tied
        outer = {k: values[k] for k in ("tie_word_embeddings",) if k in values}
        inner = values.get("text_config")
        if not isinstance(inner, dict):
            raise ValueError(f"{where}: {values['model_type']} without its text_config")
        values = outer | inner
    if values.get("model_type") in family.aliases:
        values = family.aliases[values["model_type"]](values)
    for name, value in values.items():
        if name in LAYER_COUNTS and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{where}: {name}: {value} layers; expected at most {MOST_LAYERS}")
    return family, family.their_config({k: v for k, v in values.items() if k not in STORED})


def to_ours(family: Family, theirs: Any, mtp: bool = False) -> HybridConfig:
    """Convert a published config to ours.

    Args:
        family: the family of the config.
        theirs: the published config.
        mtp: whether to include its multi-token prediction modules.

    Raises:
        NotExpressible: one line for each option that we cannot express.
    """
    flat: dict[str, Any] = {}
    mistakes: list[str] = []
    for rule in family.config:
        try:
            flat |= rule.read(theirs)
        except Inexpressible as error:
            mistakes.append(str(error))
    stacks: list[Sequence[str]] = []
    for rule in (family.mixers, family.ffn):
        try:
            stacks.append(rule.read(theirs))
        except Inexpressible as error:
            mistakes.append(str(error))
    modules: dict[str, Any] = {}
    if mtp and family.mtp is not None:
        try:
            modules = _modules(family.mtp, theirs)
        except Inexpressible as error:
            mistakes.append(str(error))
    mistakes += _unread(family, theirs)
    if mistakes:
        raise NotExpressible(f"this {family.name} cannot be a hybrid model", mistakes)
    arguments: dict[str, Any] = {path: value for path, value in flat.items() if "." not in path}
    ahead = set(modules.get("mtp_layout", ""))
    used = {letter for letters in stacks[0] for letter in letters} | (ahead & {*family.letters})
    symbols = ({*stacks[1]} - {""}) | (ahead - {*family.letters})
    arguments["mixers"] = {letter: _bound(family, flat, letter) for letter in sorted(used)}
    arguments["feed_forwards"] = {
        symbol: _options(flat, f"feed_forwards.{symbol}.") for symbol in sorted(symbols)
    }
    arguments |= _by_symbol(flat, used | symbols | {DEFAULT})
    arguments |= modules | layout_of(*stacks) | {"imported_from": family.name}
    return HybridConfig(**arguments)  # pyright: ignore[reportArgumentType]


def _modules(mtp: MTPMap, theirs: Any) -> dict[str, Any]:
    """Return our options for the multi-token prediction modules of their config."""
    count = mtp.count(theirs)
    if count > 1 and mtp.shared:
        raise Inexpressible(
            f"{mtp.key}: expected at most 1 module with shared projection and norms, got {count};"
            " try mtp=False, --no-mtp on the command line"
        )
    return {"num_mtp_layers": count, "mtp_layout": mtp.layout(theirs)} if count else {}


def _by_symbol(flat: Mapping[str, Any], symbols: set[str]) -> dict[str, Any]:
    """Group the block options that rules set for single letters."""
    settings: dict[str, Any] = {}
    for path, value in flat.items():
        setting, _, rest = path.partition(".")
        symbol, _, option = rest.partition(".")
        if setting not in AROUND or symbol not in symbols:
            continue
        values = settings.setdefault(setting, {})
        if option:
            values.setdefault(symbol, {})[option] = value
        else:
            values[symbol] = value
    return settings


def _bound(family: Family, flat: Mapping[str, Any], letter: str) -> dict[str, Any]:
    name = family.letters[letter]
    kind = {} if mixers.symbols().get(letter) == name else {"type": name}
    return kind | _options(flat, f"mixers.{letter}.")


def _options(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {path[len(prefix) :]: v for path, v in flat.items() if path.startswith(prefix)}


def unmapped_keys(family: Family, theirs: Any) -> list[str]:
    """Return the options of their config class that no rule of the family reads, ignores or pins."""
    if family.defaults:  # no config class: use the keys of the file
        names = {name for name in vars(theirs) if not name.startswith("_")}
    elif dataclasses.is_dataclass(theirs):
        names = {f.name for f in dataclasses.fields(theirs)}
    else:
        return []
    return sorted(names - family.read_keys - BOOKKEEPING)


def _unread(family: Family, theirs: Any) -> list[str]:
    """Return a line for each option that differs from its default and is unknown to the map."""
    lines = []
    names = unmapped_keys(family, theirs)
    usual = family.their_config({}) if names else None
    for name in names:
        value = getattr(theirs, name)
        if value != getattr(usual, name, None):
            lines.append(f"{name}: {value!r} is unknown to the map of {family.name!r}")
    return lines


def to_theirs(
    family: Family, model: HybridForCausalLM
) -> tuple[PreTrainedConfig, HybridForCausalLM]:
    """Convert our config to the published form, and back to ours in the family's letters (meta
    device).

    Args:
        family: the family to write.
        model: our model; only its config and the options of its modules are read.

    Raises:
        NotExpressible: one line for each layer and each option that the family cannot express.
    """
    stack = blocks(model, family.literal)
    letters, mistakes = _letters(family, stack)
    ahead = mtp_blocks(model, family.literal) if family.mtp is not None else []
    module = ahead[0] if ahead else []  # all modules are equal
    words, more = _letters(family, module, "of the MTP modules: ")
    mistakes += more
    if mistakes:
        raise NotExpressible(f"this model cannot be written as {family.name}", mistakes)
    values: dict[str, Any] = {"num_hidden_layers": len(stack)}
    flat = _flatten(model.config, [*stack, *module], [*letters, *words])
    # also as a path, for keys that select both a mixer's position and its options
    flat["letters"] = letters
    sources: list[tuple[Any, Any]] = [(rule, flat) for rule in family.config]
    symbols, both = _with_ffn(stack, letters)
    sources += [(family.mixers, both if family.literal else letters), (family.ffn, symbols)]
    for rule, source in sources:
        try:
            values |= rule.write(source)
        except Inexpressible as error:
            mistakes.append(str(error))
    if family.mtp is not None:
        count = model.config.num_mtp_layers
        if count > 1 and family.mtp.shared:
            mistakes.append(
                f"num_mtp_layers: {count} here, {family.name} can only say 1, for modules of theirs"
                " share their projection and norms"
            )
        values |= {family.mtp.key: count}
        values |= family.mtp.write("".join(_with_ffn(module, words)[1]))
    if not mistakes:
        theirs, again, mistakes = _read_back(family, values)
    if not mistakes:
        mistakes = differences(family, model, again)
    if mistakes:
        raise NotExpressible(f"this model cannot be written as {family.name}", mistakes)
    return theirs, again


def _letters(
    family: Family, stack: Sequence[Block], where: str = ""
) -> tuple[list[str], list[str]]:
    """Return the family's letters for each block, and the blocks without one."""
    letters, mistakes = [], []
    homeless: dict[str, list[int]] = {}
    for i, block in enumerate(stack):
        word = ""
        for part in block.mixers:
            try:
                word += family.letter(part.name, part.options)
            except Inexpressible as error:
                line = f"{where}{LAYERS} ({part.letter}): {error}"
                homeless.setdefault(line, []).append(block.mixer_layer)
        letters.append(word)
        regrouped = block.mixer_layer != i or (block.ffn and block.ffn_layer != i)
        if regrouped and any(getattr(p.options, "depth_scaled_decay", False) for p in block.mixers):
            mistakes.append(
                f"{where}layer {block.mixer_layer}: its decays depend on its index, which would become"
                f" {i}; write the layout with a feed-forward inside each layer, or set"
                " depth_scaled_decay"
            )
    return letters, by_layers(homeless) + mistakes


def _with_ffn(stack: Sequence[Block], letters: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the feed-forward of each block ("" for none) with the letters of its mixers."""
    symbols = [block.ffn.letter if block.ffn else "" for block in stack]
    return symbols, [word + symbol for word, symbol in zip(letters, symbols, strict=True)]


def _flatten(
    config: HybridConfig, stack: Sequence[Block], letters: Sequence[str]
) -> dict[str, Any]:
    """Flatten our config to paths and values in the family's letters.

    Each letter's first layer is used.
    """
    flat = {name: getattr(config, name) for name in inspect.get_annotations(HybridConfig)}
    named: list[tuple[str, str, Part]] = []
    for block, word in zip(stack, letters, strict=True):
        named += [("mixers", letter, part) for letter, part in zip(word, block.mixers, strict=True)]
        named += [("feed_forwards", block.ffn.letter, block.ffn)] if block.ffn else []
    for field, letter, part in named:
        options = {f"{field}.{letter}.{name}": value for name, value in vars(part.options).items()}
        for path, value in (options | respelt(part, letter)).items():
            flat.setdefault(path, value)
    return flat


def _read_back(
    family: Family, values: Mapping[str, Any]
) -> tuple[PreTrainedConfig, HybridForCausalLM, list[str]]:
    """Build their config from the written keys, and ours from theirs."""
    nothing: Any = None
    try:
        theirs = family.their_config(values)
        return theirs, on_meta(to_ours(family, theirs, mtp=True)), []
    except NotExpressible as error:
        return nothing, nothing, error.obstacles
    except ValueError as error:
        return nothing, nothing, [" ".join(str(error).split())]
