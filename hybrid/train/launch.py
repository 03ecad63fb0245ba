"""``accelerate launch`` that ends with one line instead of the launcher's traceback.

python -m hybrid.train.launch [options of accelerate launch] -m hybrid.train CONFIG [key=value ...]

The training process prints its own error and what it saved. This process forwards signals to the
processes that it starts, waits for them, and exits with their status.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import psutil

from hybrid.imports import import_arguments
from hybrid.terminal import guarded

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def training_command(
    config: str | Path, overrides: Sequence[str] = (), engine: Sequence[str] = ()
) -> list[str]:
    """Return the command ``accelerate launch -m hybrid.train CONFIG [key=value ...]`` with this
    Python.
    """
    # quiet: accelerate's traceback adds nothing to our error
    launch = [sys.executable, "-m", "hybrid.train.launch", "--quiet"]
    words = [str(config), *overrides, *import_arguments()]
    return [*launch, *engine, "-m", "hybrid.train", *words]


def shown(command: Sequence[str]) -> str:
    """Return a training command as one would type it."""
    return f"$ {shlex.join(['accelerate', 'launch', *command[3:]])}"


def launch(words: Sequence[str]) -> int:
    """Run ``accelerate launch WORDS``; return the exit status.

    Raises:
        ValueError: accelerate refuses its own options or its config file.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(words)
    # otherwise a signal ends torch's launcher before its processes have saved
    arguments.signals_to_handle = "SIGQUIT"
    arguments.quiet = False  # quiet hides the exit status
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # lists its defaults
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    watched = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in watched}
    try:
        launch_command(arguments)
        status = 0
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        status = code if code > 0 else 128 - code
    except CalledProcessError as error:  # of the launcher for one process
        status = error.returncode if error.returncode > 0 else 128 - error.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received and status else status


if __name__ == "__main__":
    sys.exit(guarded("hybrid train", lambda: launch(sys.argv[1:])))
