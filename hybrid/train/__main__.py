"""``accelerate launch -m hybrid.train CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hybrid.imports import add_option, import_user_code
from hybrid.terminal import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a model from a YAML file and return the exit status."""
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
    # After parsing: ``--help`` should not import transformers.
    from transformers.utils import logging

    from hybrid.config.options import ConfigError
    from hybrid.data.mixture import DataError
    from hybrid.train.checkpoints import CheckpointError
    from hybrid.train.config import load_config
    from hybrid.train.failures import OutOfMemory, failed
    from hybrid.train.runner import run

    logging.disable_progress_bar()  # progress bars of file writing would break up ours
    try:
        import_user_code(parsed.imports)
        result = run(load_config(parsed.config, parsed.overrides))
    except (CheckpointError, DataError, OutOfMemory) as error:
        # the error may occur in one process only
        return failed(f"error: {error}")
    except (ConfigError, FloatingPointError) as error:
        # all processes of a machine raise the same error; another machine may read other files
        reason = error.named(parsed.config) if isinstance(error, ConfigError) else error
        return failed(f"error: {reason}", silent=int(os.environ.get("LOCAL_RANK", "0")) > 0)
    if first and result.tokens:
        loss = f", loss {result.losses[-1][1]:.4f}" if result.losses else ""
        print(
            f"{result.output_dir}: {result.steps} steps{loss}, {result.parameters:,} parameters,"
            f" {result.tokens_per_second:,.0f} tokens/s in {result.seconds:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
