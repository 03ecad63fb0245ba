"""Terminal output: exit of a command, and text without markup."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED = 141  # 128 + SIGPIPE


class Interrupted(KeyboardInterrupt):
    """A run that was ended by a signal after a step; the text has what was saved and how to resume.

    Args:
        text: one line.
        status: exit status of the command.
    """

    def __init__(self, text: str, status: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.status = status


def guarded(name: str, command: Callable[[], int], quiet: bool = False) -> int:
    """Run a command; Ctrl-C ends it with one line, a closed pipe (``| head``) silently.

    Args:
        name: name of the command, for the line.
        command: returns its exit status.
        quiet: whether to print nothing on Ctrl-C, because another process of the run does.
    """
    try:
        try:
            return command()
        except KeyboardInterrupt as error:
            if not quiet:
                print(f"\n{name}: {str(error) or 'interrupted'}", file=sys.stderr)
            return getattr(error, "status", INTERRUPTED)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _closed(stream)]
        if not closed:  # another pipe was closed
            raise
        for stream in closed:  # discard what Python flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED


def _closed(stream: TextIO) -> bool:
    """Return whether the reader of a stream has closed it."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def console(**options: Any) -> Console:
    """Return a ``rich`` console that prints names with brackets literally."""
    from rich.console import Console

    made = Console(markup=False, emoji=False, **options)
    made.on_broken_pipe = _closed_pipe  # rich would exit with status 1; ``guarded`` decides
    return made


def _closed_pipe() -> None:
    raise BrokenPipeError


def text_column(text: str) -> Any:
    """Return a column of a ``rich`` progress bar that prints its fields literally."""
    from rich.progress import TextColumn

    return TextColumn(text, markup=False)
