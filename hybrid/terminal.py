"""Terminal output: the end of a command, and text without markup."""

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
    """A run that a signal ended in order; the text says what was saved and how to resume.

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
        if not closed:  # the pipe is another one
            raise
        for stream in closed:  # what Python flushes at its end goes nowhere
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
    """A ``rich`` console that prints names with brackets in them as they are."""
    from rich.console import Console

    return Console(markup=False, emoji=False, **options)


def text_column(text: str) -> Any:
    """A column of a ``rich`` progress bar, its fields as they are."""
    from rich.progress import TextColumn

    return TextColumn(text, markup=False)
