"""Registry of the functions that read and write published checkpoints.

``hybrid.convert`` depends on the model, so the model does not import it. It is imported by name when a
method needs it, as the registry does with mixers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HOME = "hybrid.convert"


@dataclass(frozen=True)
class Converter:
    """Functions for both directions of conversion.

    Attributes:
        read: maps a published model, its folder or its name to a ``HybridForCausalLM`` with its weights.
        write: maps a ``HybridForCausalLM``, a folder and a family name to the name of that family.
    """

    read: Callable[..., Any]
    write: Callable[..., str]


_registered: list[Converter] = []


def register_converter(converter: Converter) -> None:
    """Set the converter that models use."""
    _registered[:] = [converter]


def get_converter() -> Converter:
    """Return the registered converter; import ``hybrid.convert`` if there is none."""
    if not _registered:
        importlib.import_module(HOME)
    return _registered[0]
