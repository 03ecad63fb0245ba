"""Multi-token prediction modules of published checkpoints: the names of their tensors.

transformers' classes drop these tensors; servers use them for speculative decoding. Each module has
two norms, a projection, layers of the family's own types and a last norm (``hybrid.modeling.mtp``).
Its layers follow the family's weight rules under another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.convert.tensor_rules import Rule, renames

OURS = "model.layers."
"""Prefix of our layers in weight rules."""
MODULES = "mtp.depths."
"""Prefix of our modules; the index of the module follows."""


@dataclass(frozen=True)
class MTPMap:
    """The multi-token prediction modules of one family.

    Attributes:
        key: their key for the number of modules.
        layout: their config -> the layers of each module as our ``mtp_layout``, in the family's
            letters and with explicit feed-forwards: ``SE``.
        layers: prefix of their layers in the main stack, and in a module. If both are equal, the
            layers of a module are numbered after those of the stack.
        embedding_norm, hidden_norm, projection, norm: their names for these, without ``.weight``;
            ``{first}`` and ``{last}`` are the indices of a module's first and last layer.
        copies: their tensor -> our tensor, outside the layers, of which it is a copy.
        write: our ``mtp_layout`` in the family's letters -> their keys. It can omit what they
            cannot
            express: an export is read back and compared.
        shared: whether all their modules share one projection and one set of norms. Ours do not
            share them, so only one module is possible.
        default: number of modules if the key is missing.
        keys: other keys of theirs about the modules, or other names of ``key``.
    """

    key: str
    layout: Callable[[Any], str]
    layers: tuple[str, str]
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    copies: Mapping[str, str] = field(default_factory=dict)
    write: Callable[[str], Mapping[str, Any]] = lambda layout: {}
    shared: bool = False
    default: int = 0
    keys: tuple[str, ...] = ()

    def count(self, config: Any) -> int:
        """Return the number of modules in their config."""
        found = getattr(config, self.key, None)
        return self.default if found is None else found

    def owns(self, name: str, depth: int) -> bool:
        """Return whether a tensor of theirs belongs to a module, for a main stack of ``depth``
        layers.
        """
        main, ahead = self.layers
        if main != ahead:
            return name.startswith(ahead.partition(".")[0] + ".")
        found = re.match(re.escape(ahead) + r"(\d+)\.", name)
        return found is not None and int(found[1]) >= depth

    def first(self, module: int, size: int, depth: int) -> int:
        """Return the index of a module's first layer.

        Args:
            module: index of the module.
            size: layers of each module.
            depth: layers of the main stack.
        """
        main, ahead = self.layers
        return module * size + (depth if main == ahead else 0)

    def layer_rule(self, rule: Rule, module: int) -> Rule:
        """Return a weight rule for layers of the main stack as one for layers of a module."""
        main, ahead = self.layers
        theirs = tuple(_moved(name, main, ahead) for name in rule.their_names)
        ours = tuple(_moved(n, OURS, f"{_module(module)}stack.layers.") for n in rule.our_names)
        whole = _moved(rule.whole, main, ahead) if rule.whole else ""
        return replace(rule, theirs=theirs, ours=ours, whole=whole)

    def own_rules(self, module: int, first: int, size: int) -> Iterator[Rule]:
        """Yield the rules for the parts of a module outside its layers."""
        names = {
            self.embedding_norm: "embedding_norm",
            self.hidden_norm: "hidden_norm",
            self.projection: "projection",
            self.norm: "stack.norm",
        }
        spelt = {_numbered(theirs, first, size): ours for theirs, ours in names.items()}
        yield from renames("", _module(module), spelt)

    def own_copies(self, first: int, size: int) -> dict[str, str]:
        """Return ``copies`` with the layer indices filled in."""
        return {_numbered(theirs, first, size): ours for theirs, ours in self.copies.items()}


def _module(module: int) -> str:
    return f"{MODULES}{module}."


def _moved(name: str, old: str, new: str) -> str:
    assert name.startswith(old), name
    return new + name[len(old) :]


def _numbered(name: str, first: int, size: int) -> str:
    return name.replace("{first}", str(first)).replace("{last}", str(first + size - 1))
