"""Multi-token prediction modules of published checkpoints: where a family keeps them.

transformers' classes drop these tensors, and what serves a checkpoint drafts with them. Each module is
two norms, a projection, layers of the family's own kinds and a last norm (`hybrid.modeling.mtp`);
their layers follow the family's weight rules under another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.convert.tensor_rules import Rule, renames

OURS = "model.layers."
"""How the names of our layers start, in weight rules."""
MODULES = "mtp.depths."
"""How the names of our modules start; the number of the module follows."""


@dataclass(frozen=True)
class MTPMap:
    """The modules of one family.

    Attributes:
        key: of theirs, how many there are.
        layout: their config -> the layers of each as our `mtp_layout`, in the family's letters and with
            the feed-forwards named: `SE`.
        layers: how the names of their layers start in the main stack, and in a module. Where the two
            are equal, the numbers of a module's layers go on from those of the stack.
        embedding_norm, hidden_norm, projection, norm: their names for these, without `.weight`;
            `{first}` and `{last}` are the numbers of a module's first and last layer.
        copies: their tensor -> that of ours, outside the layers, of which it is a copy.
        write: our `mtp_layout` in the family's letters -> keys of theirs. What they cannot say may be
            left out: an export is read back and compared.
        shared: whether all modules of theirs have one projection and one set of norms; ours have their
            own, so that there can be one only.
        default: how many there are where the key is missing.
        keys: others of theirs that are about the modules, or other names of `key`.
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
        """How many modules their config speaks of."""
        found = getattr(config, self.key, None)
        return self.default if found is None else found

    def owns(self, name: str, depth: int) -> bool:
        """Whether a tensor of theirs belongs to a module, for a main stack of `depth` layers."""
        main, ahead = self.layers
        if main != ahead:
            return name.startswith(ahead.partition(".")[0] + ".")
        found = re.match(re.escape(ahead) + r"(\d+)\.", name)
        return found is not None and int(found[1]) >= depth

    def first(self, module: int, size: int, depth: int) -> int:
        """The number of a module's first layer.

        Args:
            module: which one, from 0.
            size: layers of each.
            depth: layers of the main stack.
        """
        main, ahead = self.layers
        return module * size + (depth if main == ahead else 0)

    def layer_rule(self, rule: Rule, module: int) -> Rule:
        """A weight rule for layers of the main stack, as one for those of a module."""
        main, ahead = self.layers
        theirs = tuple(_moved(name, main, ahead) for name in rule.their_names)
        ours = tuple(_moved(n, OURS, f"{_module(module)}stack.layers.") for n in rule.our_names)
        whole = _moved(rule.whole, main, ahead) if rule.whole else ""
        return replace(rule, theirs=theirs, ours=ours, whole=whole)

    def own_rules(self, module: int, first: int, size: int) -> Iterator[Rule]:
        """Rules for what stands around the layers of a module."""
        names = {
            self.embedding_norm: "embedding_norm",
            self.hidden_norm: "hidden_norm",
            self.projection: "projection",
            self.norm: "stack.norm",
        }
        spelt = {_numbered(theirs, first, size): ours for theirs, ours in names.items()}
        yield from renames("", _module(module), spelt)

    def own_copies(self, first: int, size: int) -> dict[str, str]:
        """`copies`, with their numbers."""
        return {_numbered(theirs, first, size): ours for theirs, ours in self.copies.items()}


def _module(module: int) -> str:
    return f"{MODULES}{module}."


def _moved(name: str, old: str, new: str) -> str:
    assert name.startswith(old), name
    return new + name[len(old) :]


def _numbered(name: str, first: int, size: int) -> str:
    return name.replace("{first}", str(first)).replace("{last}", str(first + size - 1))
