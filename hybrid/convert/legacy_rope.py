"""RoPE keys of transformers 4, which published checkpoints have and servers read.

transformers 5 has one dictionary, ``rope_parameters``, and reads the older keys if it is missing.
An export has both, with equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Words = Mapping[str, Any]

BESIDE = ("rope_theta", "partial_rotary_factor")
"""Keys beside ``rope_scaling`` in transformers 4, which are inside the dictionary now."""


def rope_words(values: Words) -> Words:
    """Return ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` for a written config of
    theirs.

    Empty if there are no positions, or if positions differ by layer type.
    """
    found = values.get("rope_parameters") or {}
    if found.get("rope_theta") is None:
        return {}
    beside = {name: found[name] for name in BESIDE if name in found}
    return beside | {"rope_scaling": _scaling(found)}


def words_by_type(local_base: str | None = None) -> Callable[[Words], Words]:
    """Return the keys of a family whose sliding-window layers are never scaled.

    Args:
        local_base: their key for the base of these layers, ``rope_local_base_freq``; None if it is
            the same.
    """

    def words(values: Words) -> Words:
        found = values.get("rope_parameters") or {}
        whole, sliding = (found.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        bases = [part.get("rope_theta") for part in (whole, sliding)]
        same = local_base is not None or bases[0] == bases[1]
        if None in bases or not same or _scaling(sliding) is not None:
            return {}
        own = {local_base: bases[1]} if local_base else {}
        return {"rope_theta": bases[0], "rope_scaling": _scaling(whole)} | own

    return words


def no_words(values: Words) -> Words:
    """Return no keys, for a family that was never published with them."""
    return {}


def _scaling(found: Words) -> Words | None:
    if found.get("rope_type", "default") == "default":
        return None
    return {name: value for name, value in found.items() if name not in BESIDE}
