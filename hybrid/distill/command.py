"""`hybrid distill`: a distillation by a YAML file, its report printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from hybrid.distill.config import load_config
from hybrid.distill.runner import distill
from hybrid.train.checkpoints import CheckpointError


def run_distillation(config: str, overrides: Sequence[str] = ()) -> None:
    """Distil by the YAML file `config` with `key=value` overrides.

    Raises:
        ValueError: mistakes in the config, a checkpoint that cannot be used, a loss that is not finite.
    """
    logging.disable_progress_bar()  # one bar is ours, those of file writing tear it apart
    try:
        report = distill(load_config(config, overrides))
    except (CheckpointError, FloatingPointError) as error:
        raise ValueError(str(error)) from error
    folder = Path(report["model"]).parent
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"student: {report['model']}, report: {folder / 'report.md'}")
