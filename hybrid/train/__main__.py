"""`accelerate launch -m hybrid.train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hybrid.imports import add_option, import_user_code
from hybrid.terminal import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Train by a YAML file; return the exit status."""
    first = int(os.environ.get("RANK", "0")) == 0
    return guarded("hybrid train", lambda: _main(arguments, first), quiet=not first)


def _main(arguments: Sequence[str] | None, first: bool) -> int:
    parser = argparse.ArgumentParser(
        prog="hybrid.train", description="Train a model by a YAML file; run again to resume."
    )
    parser.add_argument("config", help="a YAML file, e.g. one of configs/train/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. training.max_steps=10"
    )
    add_option(parser)
    parsed = parser.parse_intermixed_args(arguments)
    # After the arguments: `--help` should not wait for transformers.
    from transformers.utils import logging

    from hybrid.config.options import ConfigError
    from hybrid.data.mixture import DataError
    from hybrid.train.checkpoints import CheckpointError
    from hybrid.train.config import load_config
    from hybrid.train.failures import OutOfMemory, failed
    from hybrid.train.runner import run

    logging.disable_progress_bar()  # one bar is ours, those of file writing tear it apart
    try:
        import_user_code(parsed.imports)
        result = run(load_config(parsed.config, parsed.overrides))
    except (CheckpointError, DataError, OutOfMemory) as error:
        # which may be the trouble of one process alone
        return failed(f"error: {error}")
    except (ConfigError, FloatingPointError) as error:
        # all processes find the same, and those of another machine may look at other files
        return failed(f"error: {error}", silent=int(os.environ.get("LOCAL_RANK", "0")) > 0)
    if first:
        loss = f", loss {result.losses[-1][1]:.4f}" if result.losses else ""
        print(
            f"{result.output_dir}: {result.steps} steps{loss}, {result.parameters:,} parameters,"
            f" {result.tokens_per_second:,.0f} tokens/s in {result.seconds:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
