"""RULER v2: twelve tasks, from plain retrieval to solving what was retrieved.

Definition: NVIDIA-NeMo/Skills, nemo_skills/dataset/ruler2. Three domains of four grades each: one
needle among many keys (``mk_niah``), several needles of one key (``mv_niah``), and documents
(``qa``). The lowest grade of the first two takes RULER's words and numbers; the others take MMLU's
questions and HotpotQA's documents. What differs from the definition is only how a sample is drawn,
and that room for the answer counts into the length.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..hub import load_hub
from ..questions import HUB, LETTERS, Item, as_items, items_in
from ..seeding import generator
from .counter import Counter
from .fill import alike, cumulate, fill
from .matching import Match
from .material import Filler, Words, distinct, numbers
from .ruler_niah import line_context
from .ruler_qa import Library
from .sample import TextSample

_ROOM = 64
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_DIGITS = 10
_FEWEST = 8  # minimum questions of a split, for examples and for needles of one number
_ORDINALS = ("1st", "2nd", "3rd", "4th")


@dataclass(frozen=True)
class Kind:
    """One of the twelve tasks.

    Attributes:
        domain: what the context is made of.
        ask: copy one question, copy all of one number, or solve it; find a document by its text or
            by a question, or answer the question.
        copies: questions (or values) of one number (or key).
        steps: whether the prompt instructs to copy first and then answer.
        shots: worked examples from the context.
        match: how the answer is scored.
    """

    domain: Literal["numbers", "questions", "documents"]
    ask: Literal["copy", "copy_all", "solve", "text", "question", "answer", ""] = ""
    copies: int = 1
    steps: bool = False
    shots: int = 0
    match: Match = "words"


KINDS: dict[str, Kind] = {
    "mk_niah_basic": Kind("numbers"),
    "mk_niah_easy": Kind("questions", "copy"),
    "mk_niah_medium": Kind("questions", "solve", steps=True, shots=5, match="letter"),
    "mk_niah_hard": Kind("questions", "solve", shots=5, match="letter"),
    "mv_niah_basic": Kind("numbers", copies=4),
    "mv_niah_easy": Kind("questions", "copy_all", copies=4),
    "mv_niah_medium": Kind("questions", "copy", copies=4, steps=True, match="last"),
    "mv_niah_hard": Kind("questions", "copy", copies=4),
    "qa_basic": Kind("documents", "text", match="part"),
    "qa_easy": Kind("documents", "question", match="part"),
    "qa_medium": Kind("documents", "answer", steps=True, match="part"),
    "qa_hard": Kind("documents", "answer", match="part"),
}


class Pool(NamedTuple):
    """Questions with their choices on one line: needles, and distractors."""

    needles: tuple[tuple[str, str], ...]
    hay: tuple[tuple[str, str], ...]
    source: str


def _one_line(item: Item) -> tuple[str, str]:
    choices = "".join(f"\n{LETTERS[i]}. {text}" for i, text in enumerate(item.choices))
    return re.sub(r"\s+", " ", item.question + choices), LETTERS[item.answer]


@lru_cache(maxsize=2)
def read_pool(path: str | None) -> Pool:
    """Return MMLU's test questions, hidden among those of its auxiliary training split.

    Args:
        path: folder with ``test`` and ``auxiliary_train``, as MMLU is published; None is the hub.

    Raises:
        ValueError: nothing there, or the hub cannot be reached.
    """
    if path is None:
        way_out = "give MMLU's folder, with test and auxiliary_train, by the option mmlu"
        splits = [
            as_items(
                load_hub(HUB, config="all", split=split, what="RULER v2", way_out=way_out), HUB
            )
            for split in ("test", "auxiliary_train")
        ]
        source = HUB
    else:
        root = Path(path).expanduser()
        splits = [items_in(root / split) for split in ("test", "auxiliary_train")]
        source = root.name
        for split, found in zip(("test", "auxiliary_train"), splits, strict=True):
            if len(found) < _FEWEST:
                raise ValueError(
                    f"mmlu: expected at least {_FEWEST} questions (.jsonl, .parquet or .csv) in "
                    f"{root / split}, got {len(found)}; give MMLU's folder as it is published"
                )
    needles, hay = (tuple(map(_one_line, split)) for split in splits)
    return Pool(needles, hay, f"MMLU ({source})")


class _Parts(NamedTuple):
    """A prompt without its length: what ``build`` needs to know, and what is measured."""

    build: Callable[[int], str]
    prefix: Sequence[int]
    outputs: Callable[[int], tuple[str, ...]]
    room: int
    minimum: int
    source: str


def _numbers(kind: Kind, length: int, rng: np.random.Generator, counter: Counter, words: Words):
    """Hide a key with one value, or several, among keys with as many."""
    (key,) = words.keys(rng, 1)
    values = distinct(rng, lambda r, n: numbers(r, n, _DIGITS), kind.copies)
    needles = [_NEEDLE.format(key=key, value=value) for value in values]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    most = length // max(counter.piece("\n" + needles[0]) - 4, 1) + 5
    others = distinct(rng, words.keys, most // kind.copies + 1, taken=[key])
    drawn = numbers(rng, most, _DIGITS)
    lines = [
        _NEEDLE.format(key=others[i // kind.copies], value=value) for i, value in enumerate(drawn)
    ]
    rank, spots = rng.random(most), rng.random(len(needles)).tolist()
    noun, verb, them = ("number", "is", "it") if kind.copies == 1 else ("numbers", "are", "them")
    first = "A special magic number is" if kind.copies == 1 else "Some special magic numbers are"
    head = (
        f"{first} hidden within the following text. Make sure to memorize {them}. I will quiz you "
        f"about the {noun} afterwards.\n"
    )
    what = "is the" if kind.copies == 1 else "are all the"
    tail = (
        f"\nWhat {what} special magic {noun} for {key} mentioned in the provided text? The special "
        f"magic {noun} for {key} mentioned in the provided text {verb}"
    )

    def build(units: int) -> str:
        order = np.argsort(rank[:units]).tolist()
        return head + line_context([lines[i] for i in order], needles, spots) + tail

    few = lines[:8]
    average = counter.count("\n" + "\n".join(few)) // len(few)
    room = counter.count(" ".join(values)) + _ROOM
    return _Parts(
        build, alike(average, most), lambda _: tuple(values), room, len(needles), "other needles"
    )


_CONTEXTS = {
    "copy": "I will ask you to copy one of them. Please copy and paste the question you find.",
    "copy_all": "I will ask you to copy some of them. Please copy and paste the questions you find.",
    "solve": (
        "I will ask you to solve one of them. Please solve the question you find and make sure to put "
        "the answer (and only answer) inside \\boxed\\{\\}."
    ),
}


def _problem(kind: Kind, number: str, order: str) -> str:
    """Return the instruction for the question of this number."""
    if kind.ask == "copy_all":
        return f"Please find and copy all the Question {number} from the context."
    if kind.ask == "copy":
        if kind.steps:
            return (
                f"Please first copy all the Question {number} from the context and then copy the "
                f"{order}Question {number} at the end."
            )
        return f"Please copy the {order}Question {number} from the context."
    letters = "with an answer from A, B, C, D."
    if kind.steps:
        return f"Please copy the Question {number} from the context and then solve it {letters}"
    return f"Please solve the Question {number} from the context {letters}"


def _example(kind: Kind, number: str, question: str, letter: str) -> str:
    copied = f"\nQuestion {number}: {question}" if kind.steps else ""
    return f"{_problem(kind, number, '')}{copied}\nSolution: \\boxed{{{letter}}}"


def _questions(kind: Kind, length: int, rng: np.random.Generator, counter: Counter, pool: Pool):
    """Hide a numbered question among others; several may share one number."""
    target = pool.needles[int(rng.integers(len(pool.needles)))]
    most = min(len(pool.hay), length // 12 + kind.copies)
    drawn = rng.permutation(len(pool.hay))[:most].tolist()
    asked = [target, *(pool.hay[i] for i in drawn)]
    codes = distinct(rng, numbers, most // kind.copies + 1)
    number = [codes[i // kind.copies] for i in range(most + 1)]
    rank = rng.random(most + 1)

    def ordered(units: int) -> list[int]:
        return np.argsort(rank[: units + 1]).tolist()

    def same(units: int) -> list[int]:
        """The questions that have the number of the target, in their order."""
        return [i for i in ordered(units) if number[i] == number[0]]

    shown = [_example(kind, number[i], *asked[i]) for i in range(1, kind.shots + 1)]
    examples = "\n\n".join(shown)
    if shown:
        examples = (
            f"Here are some examples to help you understand the task:\n\n{examples}\n\nHere is the "
            "actual task you need to solve:\n\n"
        )

    def build(units: int) -> str:
        needles = "\n\n".join(f"Question {number[i]}: {asked[i][0]}" for i in ordered(units))
        place = _ORDINALS[same(units).index(0)] if kind.copies > 1 else ""
        order = f"{place} (1 indexed) " if place else ""
        head = f"Below are some questions. {_CONTEXTS[kind.ask]}\n\n{needles}\n\n"
        return head + examples + _problem(kind, number[0], order)

    def outputs(units: int) -> tuple[str, ...]:
        if kind.ask == "solve":
            return (target[1],)
        if kind.ask == "copy_all":
            return tuple(asked[i][0] for i in same(units))
        return (target[0],)

    copied = asked[: kind.copies] if kind.ask == "copy_all" or kind.steps else asked[:1]
    if kind.ask == "solve" and not kind.steps:
        copied = []
    elif kind.ask == "copy" and kind.steps:
        copied = [*copied, target]
    room = sum(counter.count(text) for text, _ in copied) + _ROOM
    prefix = cumulate(counter.piece(f"\n\nQuestion 1234567: {text}") for text, _ in asked[1:])
    return _Parts(build, prefix, outputs, room, max(kind.shots, kind.copies - 1), pool.source)


_DOCUMENT_TASKS = {
    "text": (
        "I will give you a text at the end. Please find the document index of the text. Only give me "
        "the index without any document contents.",
        "Text: {text}\nMost relevant document index:",
    ),
    "question": (
        "I will give you a question at the end. Please find the index of the most relevant document "
        "that can help answer the question. Only give me the index without any document contents.",
        "Question: {question}\nIndex of the most relevant document that can help answer the question:",
    ),
    "answer": (
        "I will ask you to answer a question based on the documents. Please answer the question.",
        "Please answer the following question based on the documents.\n\nQuestion: {question}",
    ),
}
_TWO_STEPS = (
    "Please first find and copy paste the documents relevant to the following question and then answer "
    "it based on the documents you find.\n\nQuestion: {question}"
)


def _documents(
    kind: Kind, length: int, rng: np.random.Generator, counter: Counter, library: Library
):
    """Hide the documents of a question among those of the same question that do not help, and others."""
    question = library.questions[int(rng.integers(len(library.questions)))]
    near = [*question.gold, *question.related]
    taken = set(near)
    drawn = rng.permutation(len(library.documents)).tolist()
    others = [i for i in drawn if i not in taken][: length // 16 + 1]
    kept = [*near, *others]
    number = dict(zip(kept, distinct(rng, numbers, len(kept)), strict=True))
    rank = dict(zip(kept, rng.random(len(kept)).tolist(), strict=True))
    gold = [library.documents[i] for i in question.gold]
    head, tail = _DOCUMENT_TASKS[kind.ask]
    tail = (_TWO_STEPS if kind.steps else tail).format(text=gold[0], question=question.text)

    def build(units: int) -> str:
        order = sorted([*near, *others[:units]], key=rank.__getitem__)
        needles = "\n\n".join(f"Document {number[i]}:\n{library.documents[i]}" for i in order)
        return f"Below are some documents. {head}\n\n{needles}\n\n{tail}"

    right = {
        "text": (number[question.gold[0]],),
        "question": tuple(number[i] for i in question.gold),
        "answer": question.answers,
    }[kind.ask]
    room = (sum(map(counter.count, gold)) if kind.steps else 0) + _ROOM
    prefix = cumulate(
        counter.piece(f"\n\nDocument 1234567:\n{library.documents[i]}") for i in others
    )
    return _Parts(build, prefix, lambda _: right, room, 0, library.source)


def ruler2(
    name: str,
    *,
    length: int,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
    pool: Pool | None = None,
    library: Library | None = None,
) -> TextSample:
    """Make one sample of a task.

    Args:
        name: a key of :data:``KINDS``.
        length: tokens of prompt and generation.
        index: of the sample.
        seed: of the run.
        counter: of tokens.
        filler: ignored.
        words: for keys.
        pool: for tasks on questions.
        library: for tasks on documents, with the supporting documents as gold.

    Raises:
        ValueError: a length that cannot hold the task.
    """
    kind = KINDS[name]
    rng = generator("ruler2", name, seed, length, index)
    if kind.domain == "numbers":
        parts = _numbers(kind, length, rng, counter, words)
    elif kind.domain == "questions":
        assert pool is not None
        parts = _questions(kind, length, rng, counter, pool)
    else:
        assert library is not None
        parts = _documents(kind, length, rng, counter, library)
    filled = fill(
        lambda units: counter.text(parts.build(units)),
        parts.prefix,
        length - parts.room,
        minimum=parts.minimum,
        what=f"ruler2_{name} at length {length}",
    )
    return TextSample(
        task=name,
        index=index,
        length=length,
        prompt=parts.build(filled.units),
        answer_prefix="",
        outputs=parts.outputs(filled.units),
        match=kind.match,
        max_new_tokens=parts.room,
        prompt_tokens=filled.tokens,
        slack=length - parts.room - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=parts.source,
        details={"units": filled.units},
    )
