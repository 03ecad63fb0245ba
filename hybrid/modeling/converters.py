"""Reading and writing of published checkpoints, as `hybrid.convert` registers it for the models.

The conversion is built on the model, so the model does not import it; it is imported by name when a
method needs it, as the registry does with the mixers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HOME = "hybrid.convert"


@dataclass(frozen=True)
class Converter:
    """Both directions.

    Attributes:
        read: a published model, its folder or its name -> a `HybridForCausalLM` with its weights.
        write: a `HybridForCausalLM`, a folder and the name of a family -> the family written.
    """

    read: Callable[..., Any]
    write: Callable[..., str]


_registered: list[Converter] = []


def register_converter(converter: Converter) -> None:
    """Make a converter the one that models use."""
    _registered[:] = [converter]


def get_converter() -> Converter:
    """The registered converter; imports `hybrid.convert` where none is."""
    if not _registered:
        importlib.import_module(HOME)
    return _registered[0]
