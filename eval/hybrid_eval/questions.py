"""Multiple-choice questions in MMLU's schema, from the hub or from files."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpus import read_jsonl, read_text
from .hub import load_hub
from .seeding import generator

LETTERS = "ABCDEFGHIJ"
HUB = "cais/mmlu"


@dataclass(frozen=True)
class Item:
    """One question."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str


def _item(record: dict[str, Any], where: str) -> Item:
    missing = {"question", "choices", "answer"} - set(record)
    if missing:
        raise ValueError(f"{where}: no {sorted(missing)[0]!r}; found {', '.join(sorted(record))}")
    if not isinstance(record["choices"], list | tuple):
        raise ValueError(f"{where}: choices must be a list, got {record['choices']!r}")
    choices = tuple(str(choice) for choice in record["choices"])
    answer = record["answer"]
    if isinstance(answer, str):
        letter = answer.strip().upper()
        digits = letter.isascii() and letter.isdigit()
        answer = int(letter) if digits else LETTERS.find(letter) if len(letter) == 1 else -1
    if (
        not 2 <= len(choices) <= len(LETTERS)
        or not isinstance(answer, int)
        or not 0 <= answer < len(choices)
    ):
        raise ValueError(
            f"{where}: answer {record['answer']!r} is not one of {len(choices)} choices (at least "
            f"2, at most {len(LETTERS)})"
        )
    subject = str(record.get("subject") or Path(where.split(",")[0]).stem)
    return Item(str(record["question"]), choices, answer, subject)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl or .parquet file.

    Raises:
        ValueError: not such a file; the message names it.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return [record for _, record in read_jsonl(path)]


def _read(path: Path) -> list[Item]:
    subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
    if path.suffix in (".jsonl", ".parquet"):
        records: Iterable[dict[str, Any]] = read_records(path)
    else:
        rows = csv.reader(io.StringIO(read_text(path), newline=""))
        records = [{"question": r[0], "choices": r[1:-1], "answer": r[-1]} for r in rows if r]
    return as_items(({"subject": subject, **record} for record in records), str(path))


def as_items(records: Iterable[dict[str, Any]], where: str) -> list[Item]:
    """Return rows of MMLU's schema as questions.

    Raises:
        ValueError: a row that is not in the schema; the message names it.
    """
    return [_item(record, f"{where}, item {number}") for number, record in enumerate(records, 1)]


def by_subject(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Return questions by their subject, in order."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.subject, []).append(item)
    return found


def hub_items() -> tuple[list[Item], dict[str, list[Item]]]:
    """Return MMLU's questions from the hub, and its worked examples by subject.

    Raises:
        ValueError: the hub cannot be reached, or an item is not in the schema.
    """
    splits = [
        as_items(
            load_hub(
                HUB,
                config="all",
                split=split,
                what="MMLU",
                way_out="give questions in its schema as local files, --mmlu-dir FOLDER",
            ),
            f"{HUB} {split}",
        )
        for split in ("test", "dev")
    ]
    return splits[0], by_subject(splits[1])


def items_in(place: Path) -> list[Item]:
    """Return the questions of a file, or of all files below a folder; none where there is nothing.

    Raises:
        ValueError: an item that is not in the schema.
    """
    if place.is_file():
        return _read(place)
    files = sorted(p for p in place.rglob("*") if p.suffix in (".jsonl", ".parquet", ".csv"))
    return [item for path in files for item in _read(path)]


def read_items(folder: str | Path) -> tuple[list[Item], dict[str, list[Item]]]:
    """Return the questions of a folder or file, and the worked examples by subject.

    Raises:
        ValueError: nothing there, or an item that is not in the schema.
    """
    root = Path(folder).expanduser()
    found = items_in(root / "test" if (root / "test").is_dir() else root)
    if not found:
        raise ValueError(f"{root}: no .jsonl, .parquet or .csv file with questions")
    return found, by_subject(items_in(root / "dev"))


def choose(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """Return ``n`` items at random, each subject keeping its share; more items keep the fewer."""
    if n is None or n >= len(items):
        return list(items)
    ranked = []
    for subject, found in by_subject(items).items():
        rng = generator("mmlu", seed, subject)
        # every subject is spread over (0, 1) in a random order: a prefix has its share of each
        ranks = (rng.permutation(len(found)) + rng.random()) / len(found)
        ranked += zip(ranks.tolist(), found, strict=True)
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:n]]
