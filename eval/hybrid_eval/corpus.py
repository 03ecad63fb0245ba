"""Text without a download: the source files of the Python standard library.

Models can be trained on one part and are evaluated on the other. The split follows a public rule,
which other training code can apply:

- root: ``sysconfig.get_path("stdlib")``
- files: every ``*.py`` below it, sorted by posix relative path, without those that have a
  component in :data:``EXCLUDED``
- a file is held out iff ``zlib.crc32(relative posix path) % 20 == 0``
"""

import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Split = Literal["heldout", "train", "all"]

EXCLUDED = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
)
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A named piece of text."""

    name: str
    text: str


def is_held_out(relative_path: str) -> bool:
    """Return whether the standard library file at this posix relative path is held out."""
    return zlib.crc32(relative_path.encode("utf-8")) % 20 == 0


@lru_cache(maxsize=3)
def stdlib_documents(split: Split = "heldout") -> tuple[Document, ...]:
    """Return one part of the standard library's sources, in the order of their paths.

    Files that are not UTF-8 are skipped.

    Raises:
        ValueError: ``split`` is none of the three parts.
    """
    if split not in ("heldout", "train", "all"):
        raise ValueError(f"split must be 'heldout', 'train' or 'all', got {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(_python_files(root)):
        if split != "all" and is_held_out(path) != (split == "heldout"):
            continue
        try:
            documents.append(Document(path, (root / path).read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return tuple(documents)


def _python_files(root: Path) -> Iterator[str]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in EXCLUDED]  # site-packages may be huge
        base = Path(folder).relative_to(root)
        yield from ((base / name).as_posix() for name in names if name.endswith(".py"))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8; the message names the file and the byte.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a .jsonl file with their line numbers; blank lines are skipped.

    Raises:
        ValueError: a line that is not a JSON object; the message names file and line.
    """
    # str.splitlines also splits at U+2028 and similar characters, which JSON allows in strings
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ValueError(f"{path}, line {number}: expected a JSON object, got a {kind}")
        yield number, record


def _jsonl(path: Path) -> Iterator[Document]:
    for number, record in read_jsonl(path):
        if not isinstance(record.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected an object with a string "text"')
        yield Document(f"{path.name}:{number}", record["text"])


def read_documents(path: str | Path) -> tuple[Document, ...]:
    """Read text files: a UTF-8 file, a ``.jsonl`` file with "text", or a folder of these.

    Raises:
        ValueError: the path does not exist, has no text, or has an invalid line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES)
        if not files:
            raise ValueError(f"{path}: no file ending in {', '.join(_TEXT_SUFFIXES)}")
        return tuple(document for file in files for document in read_documents(file))
    if not path.is_file():
        raise ValueError(f"{path}: no such text file or folder")
    if path.suffix == ".jsonl":
        documents = tuple(_jsonl(path))
    else:
        documents = (Document(path.name, read_text(path)),)
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"{path}: no text in it")
    return documents


@dataclass(frozen=True)
class Corpus:
    """Documents with a description for reports."""

    documents: tuple[Document, ...]
    description: str

    @property
    def text(self) -> str:
        """All documents, concatenated."""
        return "\n".join(document.text for document in self.documents)


def load_corpus(source: str | Path | None = None) -> Corpus:
    """Return the text of ``source``, or held-out standard library sources if it is None."""
    if source is None:
        documents = stdlib_documents("heldout")
        return Corpus(
            documents, f"Python standard library sources, {len(documents)} held-out files"
        )
    documents = read_documents(source)
    return Corpus(documents, f"{Path(source).name}, {len(documents)} document(s)")
