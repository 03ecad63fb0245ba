"""Distillation: a published model as the teacher, the same model under another layout as the student.

hybrid distill CONFIG [key=value ...]

load_config   a YAML file and overrides -> DistillConfig, every mistake named
distill       DistillConfig -> Report; the same call again goes on where the last one ended
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.distill.config import DistillConfig, load_config, parse_config
    from hybrid.distill.runner import distill

_HOMES = {
    "DistillConfig": "config",
    "distill": "runner",
    "load_config": "config",
    "parse_config": "config",
}

__all__ = ["DistillConfig", "distill", "load_config", "parse_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
