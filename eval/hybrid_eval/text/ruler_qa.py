"""RULER's two question answering tasks: gold documents among others (arXiv 2404.06654, section
3.4).

RULER takes SQuAD 2.0 and HotpotQA; their JSON files are read from disk. Without them documents and
questions are generated, and the task has another name.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..corpus import read_text
from ..seeding import generator
from .counter import Counter
from .fill import cumulate, fill
from .material import Filler, Words, distinct, python_words
from .sample import TextSample

_ROOM = 32
_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclass(frozen=True)
class Question:
    """A question about a library.

    Attributes:
        text: the question.
        answers: accepted answers.
        gold: the documents that contain the answer.
        related: other documents of the same article, the first to distract.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Documents and questions about them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    source: str
    official: bool


def _read_json(path: str | Path):
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file of questions")
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


@contextmanager
def _format(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not {name}'s format ({why})") from error


def read_squad(path: str) -> Library:
    """Read SQuAD 2.0 (dev-v2.0.json); questions without an answer are skipped.

    Raises:
        ValueError: no such file, or not SQuAD's format.
    """
    data = _read_json(path)
    with _format(path, "SQuAD"):
        articles = [article["paragraphs"] for article in data["data"]]
        documents = sorted({p["context"] for article in articles for p in article})
        place = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in articles:
            whole = dict.fromkeys(place[p["context"]] for p in article)
            for paragraph in article:
                gold = place[paragraph["context"]]
                related = tuple(i for i in whole if i != gold)
                questions += [
                    Question(
                        q["question"], tuple(a["text"] for a in q["answers"]), (gold,), related
                    )
                    for q in paragraph["qas"]
                    if not q.get("is_impossible", False)
                ]
        if not questions:
            raise ValueError("no question with an answer")
    return Library(tuple(documents), tuple(questions), f"SQuAD ({Path(path).name})", True)


def read_hotpot(path: str) -> Library:
    """Read HotpotQA (hotpot_dev_distractor_v1.json).

    Raises:
        ValueError: no such file, or not HotpotQA's format.
    """
    data = _read_json(path)
    with _format(path, "HotpotQA"):
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in data]
        documents = sorted({text for group in texts for text in group})
        place = {text: i for i, text in enumerate(documents)}
        questions = [
            Question(row["question"], (row["answer"],), tuple(place[text] for text in group))
            for row, group in zip(data, texts, strict=True)
        ]
        if not questions:
            raise ValueError("no question")
    return Library(tuple(documents), tuple(questions), f"HotpotQA ({Path(path).name})", True)


def read_supporting(path: str) -> Library:
    """Read HotpotQA with the documents that support an answer as gold, the others as related.

    Raises:
        ValueError: no such file, or not HotpotQA's format.
    """
    data = _read_json(path)
    with _format(path, "HotpotQA"):
        texts = [{title: f"{title}\n{''.join(s)}" for title, s in row["context"]} for row in data]
        documents = sorted({text for group in texts for text in group.values()})
        place = {text: i for i, text in enumerate(documents)}
        questions = []
        for row, group in zip(data, texts, strict=True):
            supporting = {title for title, _ in row["supporting_facts"]}
            gold, others = (
                tuple(
                    place[text] for title, text in group.items() if (title in supporting) == wanted
                )
                for wanted in (True, False)
            )
            if gold:
                questions.append(Question(row["question"], (row["answer"],), gold, others))
        if not questions:
            raise ValueError("no question with a supporting document")
    return Library(tuple(documents), tuple(questions), f"HotpotQA ({Path(path).name})", True)


@lru_cache(maxsize=2)
def generated_library(hops: int) -> Library:
    """Return generated documents about places and people that do not exist.

    With one hop the answer is in one document; with two, a person's town is in one and the
    town's river in another.

    Raises:
        ValueError: neither one nor two hops.
    """
    if hops not in (1, 2):
        raise ValueError(f"hops must be 1 or 2, got {hops}")
    words, rng, count = python_words(), generator("generated_library", hops), 600

    people, towns = distinct(rng, words.names, count), distinct(rng, words.names, count)
    rivers = distinct(rng, words.names, count, taken=towns)
    trades = ("baker", "weaver", "miller", "printer", "mason", "tailor", "glazier", "cooper")
    documents, questions = [], []
    for i in range(count):
        trade = trades[int(rng.integers(len(trades)))]
        year = int(rng.integers(1500, 1950))
        documents.append(
            f"{people[i]}\n{people[i]} was a {trade} who settled in the town of {towns[i]} in "
            f"{year}. The workshop stayed open for many years and had a good name."
        )
        documents.append(
            f"{towns[i]}\n{towns[i]} is a small town on the river {rivers[i]}. It has a market "
            f"square, a school and a bridge that was built in {year + 20}."
        )
        gold, answer = ((2 * i,), towns[i]) if hops == 1 else ((2 * i, 2 * i + 1), rivers[i])
        text = (
            f"In which town did {people[i]} settle?"
            if hops == 1
            else f"On which river lies the town in which {people[i]} settled?"
        )
        questions.append(Question(text, (answer,), gold))
    return Library(tuple(documents), tuple(questions), f"generated documents, {hops} hop(s)", False)


def qa(
    name: str,
    library: Library,
    *,
    length: int,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
) -> TextSample:
    """Ask one question of the library, its gold documents hidden among as many others as fit.

    Others of the same article come first, as they distract most; the rest are any.

    Raises:
        ValueError: a length that cannot hold the gold documents.
    """
    rng = generator(name, seed, length, index)
    question = library.questions[int(rng.integers(len(library.questions)))]
    gold = set(question.gold)
    most = min(len(library.documents) - len(gold), length // 16 + 1)
    near = rng.permutation(len(question.related)).tolist()
    nearest = [question.related[i] for i in near]
    taken = {*gold, *nearest}
    drawn = rng.permutation(len(library.documents))[: most + len(taken)].tolist()
    others = [*nearest, *(i for i in drawn if i not in taken)][:most]
    rank = dict(zip([*question.gold, *others], rng.random(most + len(gold)), strict=True))

    def build(units: int) -> tuple[str, list[int]]:
        order = sorted([*question.gold, *others[:units]], key=rank.__getitem__)
        head = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
        places, at, blocks = {}, len(head), []
        for i, document in enumerate(order, 1):
            block = f"Document {i}:\n{library.documents[document]}"
            places[document] = at
            at += len(block) + 2
            blocks.append(block)
        prompt = head + "\n\n".join(blocks)
        prompt += f"\n\n{_INSTRUCTION}\n\nQuestion: {question.text}"
        return prompt, [places[document] for document in question.gold]

    filled = fill(
        lambda units: counter.text(f"{build(units)[0]} Answer:"),
        cumulate(counter.piece(f"\n\nDocument 10:\n{library.documents[i]}") for i in others),
        length - _ROOM,
        minimum=0,
        what=f"{name} at length {length}",
    )
    prompt, places = build(filled.units)
    return TextSample(
        task=name,
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix="Answer:",
        outputs=question.answers,
        match="any",
        max_new_tokens=_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=library.source,
        depth=places[0] / len(prompt),
        needle_positions=counter.positions(f"{prompt} Answer:", places),
        details={"documents": filled.units + len(gold), "question": question.text},
    )
