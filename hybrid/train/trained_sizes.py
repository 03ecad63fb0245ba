"""Sizes of the synthetic tasks that checkpoints were trained on, for their evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid.train.trainer import CONFIG_NAME

# Options of a task that evaluation takes from training.
SIZES = {"mqar": ("pairs", "queries")}


def trained_sizes(folders: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Return row length and sizes of the tasks in the training data of these checkpoints.

    Args:
        folders: checkpoints; those not written by a training run of this package are ignored.

    Returns:
        Options by task, e.g. ``{"mqar": {"sequence_length": 128, "pairs": 16}}``. A task with
        different sizes in these checkpoints is omitted; they are compared at its defaults.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for task, sizes in _sizes_of(Path(folder) / CONFIG_NAME):
            found.setdefault(task, []).append(sizes)
    return {task: every[0] for task, every in found.items() if every.count(every[0]) == len(every)}


def _sizes_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return tasks and their sizes in the configuration of one run; empty if it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        length, data = config["sequence_length"], config["data"]
        sources = [source for source in data if isinstance(source, dict)]
        return [
            (source["source"], {"sequence_length": length, **_chosen(source)})
            for source in [*sources, *({"source": s} for s in data if isinstance(s, str))]
            if source["source"] in SIZES
        ]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return []


def _chosen(source: dict[str, Any]) -> dict[str, Any]:
    return {key: source[key] for key in SIZES[source["source"]] if key in source}
