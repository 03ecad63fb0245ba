"""Checks of the output folder over all processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hybrid.config.options import ConfigError
from hybrid.locks import FolderInUse, sole_writer
from hybrid.train.checkpoints import numbered

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_storage(args: TrainingArguments) -> None:
    """Refuse an output folder that is not shared by all processes.

    A run without checkpoints, and without one to resume from, can have a separate folder on each
    machine.

    Raises:
        ConfigError: a process does not see what the first one writes.
    """
    if args.world_size == 1:
        return
    where, sees = _sees_mark(args)
    blind = [rank for rank, found in enumerate(gather_object([sees])) if not found]
    if blind:
        raise ConfigError(
            [
                f"training.output_dir: expected storage shared by all machines, got {where}, in which"
                f" process {blind[0]} does not see the files of process 0; try shared storage (or, for"
                " a run without checkpoints, training.save_strategy: no and an empty folder)"
            ]
        )


@contextmanager
def sole_run(args: TrainingArguments) -> Iterator[None]:
    """Lock the output folder against other runs; the first process holds the lock for the whole
    run.

    Raises:
        ConfigError: another run uses the folder.
    """
    with ExitStack() as stack:
        problem: list[Any] = [None]
        if args.process_index == 0:
            try:
                stack.enter_context(sole_writer(str(args.output_dir)))
            except FolderInUse as error:
                problem[0] = str(error)
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise ConfigError([f"training.output_dir: {problem[0]}"])
        yield


def _sees_mark(args: TrainingArguments) -> tuple[str, bool]:
    """Return the folder of the first process, and whether this process sees a file written there."""
    folder, first = Path(str(args.output_dir)), args.process_index == 0
    needed = args.save_strategy != "no" or bool(numbered(folder))
    given: list[Any] = [str(folder), needed, f".shared-{uuid4().hex}"]
    broadcast_object_list(given)
    where, needed, name = given
    if not needed:
        return where, True
    mark = folder / name
    if first:
        mark.touch()
    PartialState().wait_for_everyone()
    sees = mark.exists()
    PartialState().wait_for_everyone()
    if first:
        mark.unlink()
    return where, sees
