"""``hybrid search``: search for a layout from a YAML file and print the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hybrid.config import yaml
from hybrid.search import config as on_model
from hybrid.search import runner, scratch
from hybrid.search.report import MARKDOWN, shown
from hybrid.terminal import console
from hybrid.train.checkpoints import CheckpointError


def run_search(config: str, overrides: Sequence[str] = ()) -> None:
    """Search by the YAML file ``config`` with ``key=value`` overrides.

    A file with ``train:`` searches over layouts to train from scratch, one with ``distill:`` over the
    softmax layers of a model.

    Raises:
        ValueError: mistakes in the config, a model that cannot be used, a loss that is not finite.
    """
    logging.disable_progress_bar()  # progress bars of file writing would break up ours
    settings: Any
    try:
        if "train" in yaml.read(config):
            settings = scratch.load_config(config, overrides)
            report = scratch.search_scratch(settings)
        else:
            settings = on_model.load_config(config, overrides)
            report = runner.search(settings)
    except (CheckpointError, FloatingPointError) as error:
        raise ValueError(str(error)) from error
    screen = console()
    for point in report["points"]:
        if point["frontier"]:
            recall = "".join(f", {m} {point[m]:.3f}" for m in report["metrics"])
            words = f"{point['layout']}: {point['softmax_layers']} softmax layers"
            screen.print(
                f"{words}, loss {point['loss']:.4f}{recall}", highlight=False, soft_wrap=True
            )
            screen.print(f"    {shown(point)}", highlight=False, soft_wrap=True)
    path = Path(settings.out) / MARKDOWN
    screen.print(f"report: {path}", highlight=False, soft_wrap=True)
