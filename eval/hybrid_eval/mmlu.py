"""Multiple choice in MMLU's schema, from the hub or local files, in two forms: letters and cloze.

Letters: the choices are listed as A to D and the model names a letter. That is symbol binding, a
kind of retrieval. Cloze: the model is asked for the text of the answer and never sees the list;
the choice with the largest log-likelihood wins. Cloze is the measure of what a model knows.

Questions: MMLU's own 57 subjects from the hub, five worked examples of each from its ``dev`` split;
or local files, ``*.jsonl`` or ``*.parquet`` with question, choices (list), answer (index or letter) and
optionally subject; or the original CSV (question, A, B, C, D, letter). A folder may have the
original's ``dev`` and ``test`` subfolders: then examples come from ``dev``, five per subject.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .corpus import read_jsonl, read_text
from .hub import load_hub
from .scoring import IGNORE, Progress, score
from .seeding import generator
from .stats import above_chance, mean_and_error, wilson
from .tokens import Encoder, prompt_ids

Form = Literal["letters", "cloze"]
_LETTERS = "ABCDEFGHIJ"
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
        answer = int(letter) if digits else _LETTERS.find(letter) if len(letter) == 1 else -1
    if (
        not 2 <= len(choices) <= len(_LETTERS)
        or not isinstance(answer, int)
        or not 0 <= answer < len(choices)
    ):
        raise ValueError(
            f"{where}: answer {record['answer']!r} is not one of {len(choices)} choices (at least "
            f"2, at most {len(_LETTERS)})"
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


def _read(path: Path) -> list[Item]:
    subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
    if path.suffix == ".jsonl":
        records: Iterable[dict[str, Any]] = [record for _, record in read_jsonl(path)]
    elif path.suffix == ".parquet":
        records = _read_parquet(path)
    else:
        rows = csv.reader(io.StringIO(read_text(path), newline=""))
        records = [{"question": r[0], "choices": r[1:-1], "answer": r[-1]} for r in rows if r]
    return _items(({"subject": subject, **record} for record in records), str(path))


def _items(records: Iterable[dict[str, Any]], where: str) -> list[Item]:
    return [_item(record, f"{where}, item {number}") for number, record in enumerate(records, 1)]


def _by_subject(items: Iterable[Item]) -> dict[str, list[Item]]:
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
        _items(
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
    return splits[0], _by_subject(splits[1])


def read_items(folder: str | Path) -> tuple[list[Item], dict[str, list[Item]]]:
    """Return the questions of a folder or file, and the worked examples by subject.

    Raises:
        ValueError: nothing there, or an item that is not in the schema.
    """
    root = Path(folder).expanduser()
    places = {"test": root / "test", "dev": root / "dev"}

    def files(place: Path) -> list[Path]:
        if place.is_file():
            return [place]
        return sorted(p for p in place.rglob("*") if p.suffix in (".jsonl", ".parquet", ".csv"))

    split = places["test"].is_dir()
    found = [item for path in files(places["test"] if split else root) for item in _read(path)]
    if not found:
        raise ValueError(f"{root}: no .jsonl, .parquet or .csv file with questions")
    dev = files(places["dev"]) if places["dev"].is_dir() else []
    shots = _by_subject(item for path in dev for item in _read(path))
    return found, shots


def _block(item: Item, form: Form) -> str:
    if form == "cloze":
        return f"Question: {item.question.strip()}\nAnswer:"
    listed = "".join(f"\n{_LETTERS[i]}. {text}" for i, text in enumerate(item.choices))
    return f"{item.question.strip()}{listed}\nAnswer:"


def _continuations(item: Item, form: Form) -> list[str]:
    if form == "cloze":
        return [f" {choice.strip()}" for choice in item.choices]
    return [f" {_LETTERS[i]}" for i in range(len(item.choices))]


def prompt(item: Item, examples: Sequence[Item], form: Form) -> str:
    """Return the prompt of a question: a headline and examples as MMLU has them, then itself."""
    subject = item.subject.replace("_", " ")
    kind = "multiple choice questions" if form == "letters" else "questions"
    head = f"The following are {kind} (with answers) about {subject}.\n\n"
    shown = "".join(
        f"{_block(shot, form)}{_continuations(shot, form)[shot.answer]}\n\n" for shot in examples
    )
    return head + shown + _block(item, form)


def choose(items: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """Return ``n`` items at random, each subject keeping its share; more items keep the fewer."""
    if n is None or n >= len(items):
        return list(items)
    ranked = []
    for subject, found in _by_subject(items).items():
        rng = generator("mmlu", seed, subject)
        # every subject is spread over (0, 1) in a random order: a prefix has its share of each
        ranks = (rng.permutation(len(found)) + rng.random()) / len(found)
        ranked += zip(ranks.tolist(), found, strict=True)
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:n]]


def evaluate_mmlu(
    model,
    *,
    form: Form,
    tokenizer: Encoder,
    path: str | None = None,
    n: int | None = None,
    shots: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure multiple choice in one of its two forms.

    Args:
        model: a causal language model.
        form: "letters" or "cloze".
        tokenizer: the model's.
        path: file or folder in MMLU's schema; None takes MMLU itself from the hub.
        n: number of questions, each subject keeping its share; None takes all.
        shots: worked examples per question, where there is a ``dev`` part.
        seed: of the choice of questions.
        batch_size: rows per forward; None chooses.
        progress: called with the number of continuations done and of all.
        allow_longer: permit prompts beyond ``max_position_embeddings``.

    Returns:
        accuracy (largest log-likelihood) with standard error and Wilson interval, accuracy_norm
        (log-likelihood per byte of the choice), gold_bits_per_byte, chance, per-question scores.
    """
    questions, worked = hub_items() if path is None else read_items(path)
    chosen = choose(questions, n, seed)
    rows, owners = [], []
    for number, item in enumerate(chosen):
        ids = prompt_ids(tokenizer, prompt(item, worked.get(item.subject, [])[:shots], form))
        for text in _continuations(item, form):
            answer = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            row = np.asarray([*ids, *answer], dtype=np.int64)
            labels = row.copy()
            labels[: len(ids)] = IGNORE
            rows.append({"input_ids": row, "labels": labels})
            owners.append((number, len(text.strip().encode("utf-8"))))
    scored = score(model, rows, batch_size=batch_size, progress=progress, allow_longer=allow_longer)
    totals: list[list[tuple[float, int]]] = [[] for _ in chosen]
    for (number, size), row in zip(owners, scored, strict=True):
        totals[number].append((-float(row.nll.sum()), size))
    right, normed, bits = [], [], []
    for item, found in zip(chosen, totals, strict=True):
        right.append(float(int(np.argmax([ll for ll, _ in found])) == item.answer))
        normed.append(float(int(np.argmax([ll / size for ll, size in found])) == item.answer))
        gold, size = found[item.answer]
        bits.append(-gold / size / math.log(2))
    accuracy, error = mean_and_error(right)
    lengths = [len(row["input_ids"]) for row in rows]
    chance = float(np.mean([1 / len(item.choices) for item in chosen]))
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": wilson(sum(right), len(right)),
        "accuracy_norm": mean_and_error(normed)[0],
        "accuracy_norm_interval": wilson(sum(normed), len(normed)),
        "gold_bits_per_byte": mean_and_error(bits)[0],
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "n": len(chosen),
        "form": form,
        "tokens": {"min": min(lengths), "max": max(lengths)},
        "truncated": 0,
        "haystack": f"questions of {HUB if path is None else Path(path).name}",
        "items": right,
    }
