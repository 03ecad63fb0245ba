"""``hybrid data prepare``: prepare a source, with a progress bar."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from hybrid.config.options import ConfigError
from hybrid.data.preparation import prepare
from hybrid.terminal import console, text_column


def run_preparation(source: str, out: str, **options: Any) -> None:
    """Prepare ``source`` into the folder ``out``.

    Raises:
        ValueError: mistakes of the source, joined in one line, or an error of the file system.
    """
    counts = text_column("{task.completed:,} documents, {task.fields[tokens]:,} tokens")
    screen = console(stderr=True)
    try:
        with Progress(SpinnerColumn(), counts, TimeElapsedColumn(), console=screen) as bar:
            lane = bar.add_task("", total=None, tokens=0, visible=False)

            def progress(documents: int, tokens: int) -> None:
                bar.update(lane, completed=documents, tokens=tokens, visible=True)

            index = prepare(source, out, progress=progress, **options)
    except ConfigError as error:
        raise ValueError("; ".join(error.mistakes)) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{out}: expected a folder to write, got a file; try another name"
        ) from error
    except OSError as error:
        raise ValueError(
            f"cannot write {out} ({error}); free space and run the same command again"
        ) from error
    size = f"{index['documents']:,} documents, {index['tokens']:,} tokens"
    shards = len(index["shards"])
    print(f"{out}: {size} in {shards} shard{'s' if shards > 1 else ''}")
