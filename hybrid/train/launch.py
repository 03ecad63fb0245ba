"""`accelerate launch` whose end is one line, not the launcher's traceback.

python -m hybrid.train.launch [options of accelerate launch] -m hybrid.train CONFIG [key=value ...]

A training process says itself what is wrong and what it kept; this one passes signals on to the
processes that it starts, waits for them and ends with their status.
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
    """`accelerate launch -m hybrid.train CONFIG [key=value ...]` with this Python."""
    # quiet: after an error of ours, its own traceback would say nothing
    launch = [sys.executable, "-m", "hybrid.train.launch", "--quiet"]
    words = [str(config), *overrides, *import_arguments()]
    return [*launch, *engine, "-m", "hybrid.train", *words]


def shown(command: Sequence[str]) -> str:
    """A training command as one types it."""
    return f"$ {shlex.join(['accelerate', 'launch', *command[3:]])}"


def launch(words: Sequence[str]) -> int:
    """Run `accelerate launch WORDS`; return the exit status.

    Raises:
        ValueError: accelerate refuses its own options or its config file.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(words)
    # or torch's launcher would end on a signal before its processes have saved
    arguments.signals_to_handle = "SIGQUIT"
    arguments.quiet = False  # which would hide the exit status
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
