"""Read texts from files and hub data sets, through ``datasets``."""

from __future__ import annotations

import difflib
import glob
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count, islice
from lzma import LZMAError
from pathlib import Path
from typing import Any

from hybrid.data.identity import files_checksum, hub_revision

# suffix -> the builder of ``datasets`` that reads it
BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
LINES = (".jsonl", ".ndjson")  # a row is a line
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, LZMAError)  # a truncated or damaged file


def is_path(source: str) -> bool:
    """Return whether a source names files, not a data set of the hub."""
    looks_local = glob.has_magic(source) or source.startswith((".", "/", "~"))
    return looks_local or _suffix(source) in BUILDERS or os.path.exists(source)


def find_files(pattern: str) -> list[str]:
    """Return the files of a path or pattern, sorted; for a folder, all readable files below it.

    Raises:
        ValueError: there are none, or they have several formats.
    """
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        found = [str(p) for p in Path(expanded).rglob("*") if _suffix(str(p)) in BUILDERS]
    elif os.path.isfile(expanded):
        found = [expanded]
    else:
        found = [f for f in glob.glob(expanded, recursive=True) if os.path.isfile(f)]
    if not found and os.path.isdir(expanded):
        kinds = ", ".join(sorted(BUILDERS))
        raise ValueError(f"{pattern}: expected files in the folder ({kinds}), got none")
    if not found:
        raise ValueError(f"{pattern}: expected existing files, got none{_nearby(expanded)}")
    suffixes = {_suffix(f) for f in found}
    if len({BUILDERS.get(s) for s in suffixes}) > 1:
        raise ValueError(
            f"{pattern}: expected files of one format, got {', '.join(sorted(suffixes))}; try one"
            " entry per format"
        )
    return sorted(found)


def origin(source: str) -> dict[str, int | str | None]:
    """Return fingerprints of a source's files or revision."""
    if is_path(source):
        return {"CRC-32 of its files": files_checksum(find_files(source))}
    return {"commit on the hub": hub_revision(source)}


def load_texts(
    source: str, *, text_key: str, split: str, name: str | None, streaming: bool
) -> Callable[[int], Iterator[str]]:
    """Return a function from the epoch to an iterator over the texts of files or a hub data set.

    Args:
        source: path, pattern, or name on the hub.
        text_key: column that holds the text.
        split: split of a hub data set; files have one split, "train".
        name: configuration of a hub data set.
        streaming: read as training goes, with nothing on disk.

    Raises:
        ValueError: files are missing or broken, the data set is unknown or empty, or the column is
            absent.
    """
    data: Any = _load(source, split, name, streaming)
    columns = data.column_names
    with _readable(source, 0):
        first = next(iter(data), None)
    if first is None:
        raise ValueError(f"{source}: expected at least one row, got none")
    columns = columns or list(first)
    if text_key not in columns:
        raise ValueError(
            f"text_key: expected a column of {source}, {', '.join(map(repr, columns))}, got"
            f" {text_key!r}"
        )
    data = data.select_columns([text_key])

    def start(epoch: int) -> Iterator[str]:
        if streaming:
            data.set_epoch(epoch)
        rows = iter(data)
        for number in count():
            with _readable(source, number):
                row = next(rows, None)
            if row is None:
                return
            yield _text(row[text_key], number)

    def _text(value: Any, number: int) -> str:
        if not isinstance(value, str):
            place = _line(source, number)
            raise ValueError(
                f"row {number} of {source!r}{f' ({place})' if place else ''}: expected text in column"
                f" {text_key!r}, got {'null' if value is None else type(value).__name__}"
            )
        return value

    return start


@contextmanager
def _readable(source: str, number: int) -> Iterator[None]:
    """Convert errors of readers to a ValueError with the file; ``number`` rows have been read."""
    try:
        yield
    except UNREADABLE as error:
        place = _broken_line(source, number)
        said = (str(error).strip() or repr(error)).splitlines()[0]
        reason = place or f"an error from row {number} on: {said}"
        raise ValueError(f"{source}: expected readable rows, got {reason}") from error


def _line(source: str, number: int) -> str:
    """Return ``FILE, line N`` of a row, for files with one row per line; otherwise nothing."""
    return next((place for place, _ in islice(_lines(source), number, None)), "")


def _broken_line(source: str, number: int) -> str:
    """Return ``FILE, line N: REASON`` of the first invalid JSON line from a row on; nothing if none."""
    try:
        for place, line in islice(_lines(source), number, None):
            try:
                json.loads(line)
            except ValueError as error:
                return f"{place}: {getattr(error, 'msg', error)}"
    except UNREADABLE:  # a truncated compressed file has no line to report
        pass
    return ""


def _lines(source: str) -> Iterator[tuple[str, bytes]]:
    """Yield ``FILE, line N`` and the line, for files with one row per line.

    Nothing for other sources.
    """
    import fsspec

    files = find_files(source) if is_path(source) else []
    for file in files if all(_suffix(f) in LINES for f in files) else []:
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", line


def _load(source: str, split: str, name: str | None, streaming: bool) -> Any:
    import datasets

    load: Callable[..., Any] = datasets.load_dataset
    if int(os.environ.get("LOCAL_RANK", "0")):
        datasets.disable_progress_bars()
    if is_path(source):
        files = find_files(source)
        builder = BUILDERS.get(_suffix(files[0]))
        if builder is None:
            raise ValueError(
                f"{files[0]}: expected a file with one of the suffixes {', '.join(sorted(BUILDERS))}"
            )
        packed = next((file for file in files if file.endswith(".zst")), None)
        if packed and find_spec("zstandard") is None:  # ``datasets`` would read the bytes as text
            raise ValueError(
                f"{packed}: expected the package zstandard, got none; try pip install zstandard"
            )
        if not any(os.path.getsize(file) for file in files):
            raise ValueError(f"{source}: expected text, got {len(files)} empty files")
        # A file of plain text is one document.
        options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        return _refuse_unreadable(
            lambda: load(builder, data_files=files, split="train", streaming=streaming, **options),
            source,
        )
    # a file name with a misspelt suffix looks like a data set of the hub
    hint = _nearby(source) if os.path.isdir(os.path.dirname(source) or ".") else ""
    return _refuse_unreadable(
        lambda: load(source, name, split=split, streaming=streaming), source, hint
    )


def _refuse_unreadable(load: Callable[[], Any], source: str, hint: str = "") -> Any:
    from datasets.exceptions import DatasetGenerationError

    try:
        return load()
    except (*UNREADABLE, DatasetGenerationError) as error:
        # ``datasets`` has the reason in the error's cause.
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n", 1)[0]
        if isinstance(cause, UNREADABLE):
            reason = _broken_line(source, 0) or reason
        if isinstance(cause, UnicodeDecodeError):
            hint = "; try UTF-8, such as by `iconv -f latin1 -t utf-8`"
        raise ValueError(f"{source}: expected a data set, got {reason}{hint}") from error


def _suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in PACKED_SUFFIXES else suffix


def _nearby(pattern: str) -> str:
    folder = os.path.dirname(pattern) or "."
    if not os.path.isdir(folder):
        return f" (there is no folder {folder!r})" if not glob.has_magic(folder) else ""
    near = difflib.get_close_matches(os.path.basename(pattern), os.listdir(folder), n=1)
    return f", did you mean {os.path.join(os.path.dirname(pattern), near[0])!r}?" if near else ""
