"""A published family: a config map, a layer map and a weight map, each used in both directions.

Config maps work on two flat views. Theirs is an object with the attributes of their config. Ours is
a mapping of paths: ``hidden_size``, ``mixers.S.num_heads``, ``feed_forwards.E.top_k``, with the
family's letters. To read, each rule returns paths and values; to write, it returns keys and
values. Options that a family cannot express need no rule: an export is read back and compared (see
``engine``).
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
    """A value that the other side cannot express."""


class NotExpressible(ValueError):
    """A conversion that is not possible; ``obstacles`` has one line of text for each reason."""

    def __init__(self, what: str, obstacles: Sequence[str]) -> None:
        self.obstacles = list(obstacles)
        super().__init__("\n    - ".join([f"{what}:", *self.obstacles]))


@dataclass(frozen=True)
class ConfigRule:
    """A rule between some of their keys and some of our paths.

    Attributes:
        keys: their keys that the rule covers.
        read: their config -> {our path: value}.
        write: ours -> {their key: value}. Paths of letters that the layout does not use are absent.
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
    """Map one of their keys to one of our paths, or to several paths that must be equal.

    Args:
        theirs: the key.
        ours: the paths; default: the same name at the top level. Export reads the first one in use.
        values: their value -> ours, if they differ (names of activations).
        optional: if our value is None, the export uses their default.
    """
    paths = ours or (theirs,)

    def read(config: Any) -> Flat:
        if not hasattr(config, theirs):  # missing in config.json: both sides use their default
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
    """Require one of some values for a key of theirs; export writes the first one."""

    def read(config: Any) -> Flat:
        value = getattr(config, theirs, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise Inexpressible(
                f"{theirs}: expected {wanted}, got {value!r}, which hybrid models cannot express"
            )
        return {}

    return ConfigRule((theirs,), read, lambda flat: {theirs: allowed[0]})


def always(**ours: Any) -> ConfigRule:
    """Set options of ours that the family has no key for, because they are always the same.

    Dots of a path are written as double underscores: ``always(mixers__S__qk_norm="head")``. The
    path of the dense feed-forward, ``feed_forwards__-__bias``, needs ``**{...}``.
    """
    flat = {path.replace("__", "."): value for path, value in ours.items()}
    return ConfigRule((), lambda config: flat, lambda flat: {})


def both(*keys: str, read: Callable[[Any], Flat], write: Callable[[Flat], Flat]) -> ConfigRule:
    """Relate keys and paths by two inverse functions. Either can raise Inexpressible."""
    return ConfigRule(keys, read, write)


def ignored(*keys: str) -> ConfigRule:
    """Ignore keys of theirs that do not affect the computation; exports have their defaults."""
    return ConfigRule(keys, lambda config: {}, lambda flat: {}, ignored=True)


def rope(
    *letters: str,
    key: str = "rope_parameters",
    partial: bool = False,
    drop: Sequence[str] = (),
    nope: bool = False,
) -> ConfigRule:
    """Map their RoPE dictionary, equal to ours, for some softmax letters of the family.

    Args:
        letters: the letters.
        key: their key.
        partial: whether their class uses ``partial_rotary_factor``; many accept and ignore it.
        drop: other entries that do not affect the computation.
        nope: whether their class has no positions if there is no base (OLMo Hybrid).
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
    """The contents of each layer, from their keys to the family's letters.

    Attributes:
        keys: their keys that the rule reads.
        read: their config -> a string of letters for each layer, "" for an empty layer.
        write: that list -> {their key: value}. It can omit what it cannot express: an export is
            read back, and the error names each layer that differs.
    """

    keys: tuple[str, ...]
    read: Callable[[Any], Sequence[str]]
    write: Callable[[Sequence[str]], Flat]


def everywhere(letters: str) -> LayerRule:
    """Return a rule with the same letters in every layer; "" for none."""
    return LayerRule((), lambda config: [letters] * config.num_hidden_layers, lambda layers: {})


def by_type(key: str = "layer_types", /, **letters: str) -> LayerRule:
    """Return a rule for a list of types: ``by_type(full_attention="S", linear_attention="D")``."""

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
        name: its ``model_type``, or a unique name if two architectures share a type.
        model_type: the ``model_type``.
        architecture: the class in ``config.json``, such as ``LlamaForCausalLM``.
        letters: letter -> mixer; the family's alphabet, independent of the letters of a layout.
        config: config rules.
        mixers, ffn: layer rules for the mixers and for the feed-forwards.
        weights: weight rules.
        choose: (mixer, its options) -> letter, for an alphabet with two letters for one mixer.
        unread_weights: patterns (of ``fnmatch``) of tensors that their class does not read either.
        spellings: (prefix or part of a tensor name in some checkpoints, replacement) that their
            class also accepts.
        wrapped_in: model types that hold this one as their ``text_config`` (image parts are
            ignored).
        aliases: other published model types (or its own, for older keys), each with a function that
            converts its keys to those of their class.
        literal: each of their layers is a mixer or a feed-forward, never both (Nemotron-H). Then
            ``mixers`` writes both kinds, because one list of theirs holds them.
        joins_next: symbols merged with the following layer in the Hugging Face model (Zamba2's
            shared block and the Mamba-2 layer after it). In tensor names ``{depth}`` is the index
            of such a layer among them, and ``{block}`` their index of the layer whose weights it
            shares.
        mtp: names of its multi-token prediction modules; None for a family without.
        published: their written config -> additional published keys for servers (see
            ``published``).
        wrap_as: model type of an export that has the text model as its ``text_config``.
        filed: (pattern, replacement) of ``re.sub`` for tensors published under other names than
            transformers writes. ``spellings`` reads both.
        filed_whole: parts of the names of tensors that were published under the ``whole`` name of
            their rule (stacked experts).
        limits: their written config -> what servers ignore or do not support, one line each.
        legacy_rope: their written config -> the RoPE keys of transformers 4. Exports also write
            them, for servers (see ``legacy_rope``).
        defaults: defaults of their config, for a family without a config class in transformers.
        notes: remarks for users.
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
        """Return the published name of a tensor of transformers' class."""
        for pattern, replacement in self.filed:
            name = re.sub(pattern, replacement, name)
        return name

    def letter(self, mixer: str, options: Any) -> str:
        """Return the letter of a mixer. Raises Inexpressible if the family has no such mixer."""
        fitting = [letter for letter, name in self.letters.items() if name == mixer]
        if not fitting:
            known = " and ".join(sorted(set(self.letters.values())))
            raise Inexpressible(f"expected the mixers of {self.name}, {known}, got {mixer}")
        if len(fitting) == 1 or self.choose is None:
            return fitting[0]
        return self.choose(mixer, options)

    def their_config(self, values: Mapping[str, Any]) -> PreTrainedConfig:
        """Build their config from its keys, with their defaults and their checks.

        Raises:
            ValueError: their class refuses a value, or this transformers does not have the class.
        """
        known = deepcopy({**self.defaults, **values})  # their class modifies dictionaries
        known.pop("model_type", None)
        if known.get("rope_scaling", 0) is None:  # a deprecated key without a value
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
        # by module name: other packages can register a class of theirs for the model type
        try:
            return getattr(transformers, name).from_dict(known)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        # errors of RoPE checks, of unknown fields, and of unchecked values
        except (KeyError, AttributeError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{name} of transformers refuses this config: {error}") from error

    @property
    def read_keys(self) -> set[str]:
        """Return every key of theirs that a rule reads or ignores."""
        rules = (*self.config, self.mixers, self.ffn)
        return (
            {name for found in rules for name in found.keys}
            | {"num_hidden_layers"}
            | self._mtp_keys
        )

    @property
    def written_keys(self) -> set[str]:
        """Return the keys that an export writes, with or without multi-token prediction modules."""
        ignored = {name for found in self.config if found.ignored for name in found.keys}
        return self.read_keys - ignored - self._mtp_keys

    @property
    def _mtp_keys(self) -> set[str]:
        return set() if self.mtp is None else {self.mtp.key, *self.mtp.keys}


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Register a family; refuse a second one for the same model type."""
    if family.name in FAMILIES:
        raise ValueError(f"the family {family.name!r} is registered already")
    FAMILIES[family.name] = family
    return family


def get_family(name: str, architectures: object = None) -> Family:
    """Return the family of a model type, including ``aliases`` and ``wrapped_in``.

    Args:
        name: the model type.
        architectures: ``architectures`` of the config, if two families share the model type.

    Raises:
        ValueError: the family is unknown; the message has the nearest name.
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
        raise Inexpressible(f"{name}: expected one of {known}, got {value!r}")
    return values[value]
