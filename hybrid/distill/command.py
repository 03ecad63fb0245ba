"""``hybrid distill``: run a distillation from a YAML file and print its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from hybrid.distill.config import load_config
from hybrid.distill.runner import distill
from hybrid.train.checkpoints import CheckpointError


def run_distillation(config: str, overrides: Sequence[str] = ()) -> None:
    """Distil with the YAML file ``config`` and ``key=value`` overrides.

    Raises:
        ValueError: mistakes in the config, a checkpoint that cannot be used, a loss that is not
            finite.
    """
    logging.disable_progress_bar()  # progress bars of file writing would break up ours
    try:
        report = distill(load_config(config, overrides))
    except (CheckpointError, FloatingPointError) as error:
        raise ValueError(str(error)) from error
    folder = Path(report["model"]).parent
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"student: {report['model']}, report: {folder / 'report.md'}")
