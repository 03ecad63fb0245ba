"""Training: a YAML in, a Hugging Face checkpoint out, on transformers' `Trainer`.

accelerate launch -m hybrid.train CONFIG [key=value ...]

load_config   a YAML file and overrides -> TrainConfig, every mistake named
run           TrainConfig -> RunResult; the same call again goes on where the last one ended
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.train.config import MuonConfig, TrainConfig, load_config, parse_config
    from hybrid.train.runner import RunResult, run

# Light on purpose: `import hybrid.train` does not load transformers.
_HOMES = {
    "MuonConfig": "config",
    "RunResult": "runner",
    "TrainConfig": "config",
    "load_config": "config",
    "parse_config": "config",
    "run": "runner",
}

__all__ = ["MuonConfig", "RunResult", "TrainConfig", "load_config", "parse_config", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
