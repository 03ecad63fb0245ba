"""What a published family is: a config map, a layer map and a weight map, each read both ways.

Config maps work on two flat views. Theirs is an object with their config's attributes. Ours is a
mapping of paths: `hidden_size`, `mixers.S.num_heads`, `feed_forwards.E.top_k`; letters are the
family's. Reading asks each rule for paths and values; writing asks each for keys and values. What a
family has no place for needs no rule: an export is read back and compared (see `engine`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

from hybrid.config.options import did_you_mean
from hybrid.convert.legacy_rope import rope_words
from hybrid.convert.mtp import MTPMap
from hybrid.convert.published import no_limits, nothing
from hybrid.convert.tensor_rules import Rule

Flat = Mapping[str, Any]


class Inexpressible(ValueError):
    """A value that the other side has no word for."""


class NotExpressible(ValueError):
    """What stands in the way of a conversion; `obstacles` holds one line of text for each."""

    def __init__(self, what: str, obstacles: Sequence[str]) -> None:
        self.obstacles = list(obstacles)
        super().__init__("\n    - ".join([f"{what}:", *self.obstacles]))


@dataclass(frozen=True)
class ConfigRule:
    """Some of their keys and some of our paths.

    Attributes:
        keys: the keys of theirs that it is about.
        read: their config -> {our path: value}.
        write: ours -> {their key: value}. Paths of a letter that the layout does not use are absent.
    """

    keys: tuple[str, ...]
    read: Callable[[Any], Flat]
    write: Callable[[Flat], Flat]
    ignored: bool = False


def key(
    theirs: str,
    *ours: str,
    values: Mapping[Any, Any] | None = None,
    optional: bool = False,
) -> ConfigRule:
    """One key of theirs that says the same as one path of ours, or as several that must agree.

    Args:
        theirs: the key.
        ours: the paths; default: the same name, at the top. Writing takes the first that is used.
        values: their value -> ours, where they differ (names of activations).
        optional: where ours is None, an export takes their default.
    """
    paths = ours or (theirs,)

    def read(config: Any) -> Flat:
        if not hasattr(config, theirs):  # left out of config.json: both sides have their default
            return {}
        value = getattr(config, theirs)
        if values is not None:
            value = _translate(theirs, value, values)
        return dict.fromkeys(paths, value)

    def write(flat: Flat) -> Flat:
        path = next((path for path in paths if path in flat), None)
        if path is None or (optional and flat[path] is None):
            return {}
        value = flat[path]
        if values is not None:
            back = {ours_value: theirs_value for theirs_value, ours_value in values.items()}
            value = _translate(path, value, back)
        return {theirs: value}

    return ConfigRule((theirs,), read, write)


def must(theirs: str, *allowed: Any) -> ConfigRule:
    """A key of theirs that only has a meaning here if it is one of some values; the first is written."""

    def read(config: Any) -> Flat:
        value = getattr(config, theirs, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise Inexpressible(
                f"{theirs}: {value!r} cannot be expressed here; it would have to be {wanted}"
            )
        return {}

    return ConfigRule((theirs,), read, lambda flat: {theirs: allowed[0]})


def always(**ours: Any) -> ConfigRule:
    """Options of ours that the family has no key for, because it always has them so.

    Dots of a path are written as double underscores: `always(mixers__S__qk_norm="head")`; the dense
    feed-forward's path is `feed_forwards__-__bias`, which wants `**{...}`.
    """
    flat = {path.replace("__", "."): value for path, value in ours.items()}
    return ConfigRule((), lambda config: flat, lambda flat: {})


def both(*keys: str, read: Callable[[Any], Flat], write: Callable[[Flat], Flat]) -> ConfigRule:
    """Keys and paths related by two functions, inverse to each other. Either may raise Inexpressible."""
    return ConfigRule(keys, read, write)


def ignored(*keys: str) -> ConfigRule:
    """Keys of theirs that do not touch what the model computes; they keep their defaults in exports."""
    return ConfigRule(keys, lambda config: {}, lambda flat: {}, ignored=True)


def rope(
    *letters: str,
    key: str = "rope_parameters",
    partial: bool = False,
    drop: Sequence[str] = (),
    nope: bool = False,
) -> ConfigRule:
    """Their rope dictionary, the same as ours, for some of the family's softmax letters.

    Args:
        letters: the letters.
        key: theirs.
        partial: whether their class heeds `partial_rotary_factor`; many have it and do not.
        drop: other entries that do not touch what the model computes.
        nope: whether their class goes without positions where there is no base (OLMo Hybrid).
    """
    paths = [f"mixers.{letter}.rope_parameters" for letter in letters]
    left_out = {*drop} if partial else {*drop, "partial_rotary_factor"}

    def read(config: Any) -> Flat:
        given = getattr(config, key) or {}
        if nope and given.get("rope_theta") is None:
            return dict.fromkeys(paths)
        found = {k: v for k, v in given.items() if v is not None and k not in left_out}
        return {path: dict(found) for path in paths}

    def write(flat: Flat) -> Flat:
        used = [flat[path] for path in paths if flat.get(path) is not None]
        none = {key: {"rope_type": "default", "rope_theta": None}} if nope else {}
        return {key: dict(used[0])} if used else none

    return ConfigRule((key,), read, write)


@dataclass(frozen=True)
class LayerRule:
    """What stands in each layer, in their words and in the family's letters.

    Attributes:
        keys: the keys of theirs that it reads.
        read: their config -> for each layer a string of letters, "" for nothing there.
        write: that list -> {their key: value}. What it cannot say it may leave out: an export is read
            back, and the layer that comes out different is named.
    """

    keys: tuple[str, ...]
    read: Callable[[Any], Sequence[str]]
    write: Callable[[Sequence[str]], Flat]


def everywhere(letters: str) -> LayerRule:
    """The same in every layer; "" for nothing in any."""
    return LayerRule((), lambda config: [letters] * config.num_hidden_layers, lambda layers: {})


def by_type(key: str = "layer_types", /, **letters: str) -> LayerRule:
    """A list of types, one a layer: `by_type(full_attention="S", linear_attention="D")`."""

    def read(config: Any) -> Sequence[str]:
        return [_translate(key, kind, letters) for kind in getattr(config, key)]

    def write(layers: Sequence[str]) -> Flat:
        types = {letter: kind for kind, letter in letters.items()}
        return {key: [types.get(layer, next(iter(letters))) for layer in layers]}

    return LayerRule((key,), read, write)


@dataclass(frozen=True)
class Family:
    """One published architecture.

    Attributes:
        name: its `model_type`, or its own where two architectures share one.
        model_type: that one.
        architecture: the class that `config.json` names, such as `LlamaForCausalLM`.
        letters: letter -> mixer; the family's own alphabet, whatever letters a layout uses for them.
        config: config rules.
        mixers, ffn: layer rules for the two halves of a layer.
        weights: weight rules.
        choose: (mixer, its options) -> letter, for an alphabet with one mixer under two letters.
        unread_weights: patterns (of `fnmatch`) of tensors that their class does not read either.
        spellings: (prefix or part of a name in some checkpoints, what it is here): what else their
            class accepts.
        wrapped_in: model types that hold this one as their `text_config` (images are left out).
        aliases: model types under which it is published (its own, where older words are in use), and
            what turns the keys of each into those of their class.
        literal: each of their layers is a mixer or a feed-forward, never both (Nemotron-H); then
            `mixers` writes both kinds, for one list of theirs holds them.
        joins_next: letters of layers of ours that are one with the next layer in theirs (Zamba2's
            shared block and the Mamba-2 that it feeds). In names of tensors `{depth}` is the number
            of such a layer among them, and `{block}` their index of the one whose weights it has.
        mtp: where its multi-token prediction modules are; None for a family without.
        published: a config of theirs as it is written -> the published keys that are written beside,
            for servers (see `published`).
        wrap_as: model type under which an export is written, the text model as its `text_config`.
        filed: (pattern, replacement) of `re.sub`: names of tensors that were published otherwise than
            transformers writes them. `spellings` reads both.
        filed_whole: parts of the names of tensors that were published under the `whole` name of their
            rule (experts stacked into one).
        limits: a config of theirs as it is written -> what servers ignore or cannot do, a line each.
        legacy_rope: a config of theirs as it is written -> the RoPE keys of transformers 4, which
            exports write too, for servers (see `legacy_rope`).
        defaults: their config's defaults, for a family that transformers has no config class for.
        notes: what is worth knowing.
    """

    name: str
    architecture: str
    letters: Mapping[str, str]
    config: tuple[ConfigRule, ...]
    mixers: LayerRule
    ffn: LayerRule
    weights: tuple[Rule, ...]
    choose: Callable[[str, Any], str] | None = None
    unread_weights: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    wrapped_in: tuple[str, ...] = ()
    aliases: Mapping[str, Callable[[Flat], Flat]] = field(default_factory=dict)
    literal: bool = False
    joins_next: str = ""
    mtp: MTPMap | None = None
    model_type: str = ""
    published: Callable[[Flat], Flat] = nothing
    wrap_as: str = ""
    filed: tuple[tuple[str, str], ...] = ()
    filed_whole: tuple[str, ...] = ()
    limits: Callable[[Flat], list[str]] = no_limits
    legacy_rope: Callable[[Flat], Flat] = rope_words
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""

    def file_name(self, name: str) -> str:
        """The name under which a tensor of transformers' class was published."""
        for pattern, replacement in self.filed:
            name = re.sub(pattern, replacement, name)
        return name

    def letter(self, mixer: str, options: Any) -> str:
        """The letter of a mixer. Raises Inexpressible where the family has no such mixer."""
        fitting = [letter for letter, name in self.letters.items() if name == mixer]
        if not fitting:
            known = " and ".join(sorted(set(self.letters.values())))
            raise Inexpressible(f"{mixer} has no place in {self.name}, which has {known}")
        if len(fitting) == 1 or self.choose is None:
            return fitting[0]
        return self.choose(mixer, options)

    def their_config(self, values: Mapping[str, Any]) -> PreTrainedConfig:
        """A config of theirs from its keys, with their own defaults and their own checks.

        Raises:
            ValueError: a value that their class refuses; or a transformers without that class.
        """
        known = deepcopy({**self.defaults, **values})  # for their class writes into dictionaries
        known.pop("model_type", None)
        if known.get("rope_scaling", 0) is None:  # a deprecated word, here for nothing
            del known["rope_scaling"]
        name = CONFIG_MAPPING_NAMES.get(self.name)
        if name is None and not self.defaults:
            raise ValueError(
                f"transformers {transformers.__version__} does not have {self.name} yet; install a"
                " later one"
            )
        if name is None:
            kind = type("PublishedConfig", (PreTrainedConfig,), {"model_type": self.name})
            return kind(**known)
        # by its own module, for other packages may put a class of theirs behind the model type
        try:
            return getattr(transformers, name).from_dict(known)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        # of rotary positions; of what is not a field; of a value that their class reads unchecked
        except (KeyError, AttributeError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{name} of transformers refuses this config: {error}") from error

    @property
    def read_keys(self) -> set[str]:
        """Every key of theirs that some rule reads or ignores on purpose."""
        rules = (*self.config, self.mixers, self.ffn)
        return (
            {name for found in rules for name in found.keys}
            | {"num_hidden_layers"}
            | self._mtp_keys
        )

    @property
    def written_keys(self) -> set[str]:
        """Those that an export carries over, whether there are modules for more tokens or not."""
        ignored = {name for found in self.config if found.ignored for name in found.keys}
        return self.read_keys - ignored - self._mtp_keys

    @property
    def _mtp_keys(self) -> set[str]:
        return set() if self.mtp is None else {self.mtp.key, *self.mtp.keys}


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family; refuses a second one for the same model type."""
    if family.name in FAMILIES:
        raise ValueError(f"the family {family.name!r} is registered already")
    FAMILIES[family.name] = family
    return family


def get_family(name: str, architectures: object = None) -> Family:
    """The family of a model type, its own or one of its others (`aliases`, `wrapped_in`).

    Args:
        name: the model type.
        architectures: of the config, where two families share the model type.

    Raises:
        ValueError: there is none; with the nearest right name.
    """
    for family in FAMILIES.values():
        named = isinstance(architectures, list) and family.architecture in architectures
        if named and name == family.model_type:
            return family
        if name in family.wrapped_in or name in family.aliases:
            return family
    if name not in FAMILIES:
        by_class = [family.name for family in FAMILIES.values() if family.architecture == name]
        others = (n for f in FAMILIES.values() for n in (*f.aliases, *f.wrapped_in))
        known = sorted({*FAMILIES, *others})
        hint = did_you_mean(by_class[0] if by_class else name, known)
        raise ValueError(f"no map for the family {name!r}, {hint}")
    return FAMILIES[name]


def _translate(name: str, value: Any, values: Mapping[Any, Any]) -> Any:
    if value not in values:
        known = ", ".join(map(repr, values))
        raise Inexpressible(f"{name}: {value!r} cannot be expressed; these can: {known}")
    return values[value]
