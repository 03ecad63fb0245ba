"""ARC, HellaSwag and CommonsenseQA in cloze form after OLMES (Gu et al. 2024, arXiv 2406.08446).

The prompt does not list the choices; the answer is the choice with the best likelihood, normalised
as in OLMES for each task. One difference: OLMES has five hand-picked worked examples; here they are
drawn from the training split, the same for all questions. The questions come from the hub, or from
files of the same schema: one .jsonl or .parquet each for the questions and for the examples.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choices import Normalisation, Problem, choose_by_likelihood
from .hub import load_hub
from .questions import read_records
from .scoring import Progress
from .seeding import generator
from .stats import above_chance, mean_and_error, proportion_interval
from .tokens import Encoder

# prompt of PMI, without the question
_UNCONDITIONED = "Answer:"


@dataclass(frozen=True)
class Question:
    """Prompt of a question, and its choices."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Suite:
    """A task: source of its questions, and normalisation of its likelihoods."""

    hub: str
    config: str | None
    split: str
    normalisation: Normalisation
    read: Callable[[dict[str, Any]], Question]


def _labelled(record: dict[str, Any]) -> Question:
    """Read a question of ARC or CommonsenseQA."""
    asked = record["question"]
    choices = record["choices"] if "choices" in record else asked["choices"]
    if isinstance(asked, dict):  # AI2's own files, and CommonsenseQA's
        asked = asked["stem"]
    if isinstance(choices, dict):  # as on the hub
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = ([choice[key] for choice in choices] for key in ("text", "label"))
    answer = list(labels).index(record["answerKey"])
    return Question(f"Question: {asked.strip()}\nAnswer:", tuple(texts), answer)


def _plain(text: str) -> str:
    """Remove WikiHow's markup from a text, as in HellaSwag's preprocessing."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(record: dict[str, Any]) -> Question:
    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}".strip()
    endings = tuple(map(_plain, record["endings"]))
    return Question(_plain(f"{record['activity_label']}: {context}"), endings, int(record["label"]))


SUITES: dict[str, Suite] = {
    "olmes_arc_easy": Suite("allenai/ai2_arc", "ARC-Easy", "test", "characters", _labelled),
    "olmes_arc_challenge": Suite("allenai/ai2_arc", "ARC-Challenge", "test", "pmi", _labelled),
    "olmes_csqa": Suite("tau/commonsense_qa", None, "validation", "pmi", _labelled),
    "olmes_hellaswag": Suite("Rowan/hellaswag", None, "validation", "characters", _hellaswag),
}


def _read(suite: Suite, records: Sequence[dict[str, Any]], where: str) -> list[Question]:
    found = []
    for number, record in enumerate(records, 1):
        try:
            question = suite.read(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{where}, item {number}: expected the schema of {suite.hub}, got {why}; found "
                f"{', '.join(sorted(map(str, record)))}"
            ) from error
        if not 0 <= question.answer < len(question.choices):
            raise ValueError(f"{where}, item {number}: answer {question.answer} is not a choice")
        found.append(question)
    return found


def _load(task: str, path: str | None, split: str) -> tuple[list[Question], str]:
    """Return the questions and their source."""
    suite = SUITES[task]
    if path is None:
        way_out = f"give files of its schema, --set {task}.path=FILE --set {task}.examples=FILE"
        rows = load_hub(suite.hub, config=suite.config, split=split, what=task, way_out=way_out)
        return _read(suite, rows, f"{suite.hub} {split}"), suite.hub
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{task}: no file {path}")
    return _read(suite, read_records(file), str(file)), file.name


def _worked(task: str, path: str | None, examples: str | None, shots: int, seed: int):
    """Return the worked examples: the same, in the same order, for every question."""
    if shots == 0:
        return []
    if path is not None and examples is None:
        raise ValueError(
            f"{task}: {shots} worked example(s) asked for, but only questions are given; give "
            f"--set {task}.examples=FILE, or ask for none with --set {task}.shots=0"
        )
    found, where = _load(task, examples, "train")
    if len(found) < shots:
        raise ValueError(f"{task}: {shots} worked examples asked for, {where} has {len(found)}")
    order = generator(task, "examples", seed).permutation(len(found))[:shots].tolist()
    return [found[i] for i in order]


def evaluate_olmes(
    model,
    *,
    task: str,
    tokenizer: Encoder,
    n: int | None = None,
    shots: int = 5,
    path: str | None = None,
    examples: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure one of the four tasks.

    Args:
        model: a causal language model.
        task: a key of :data:``SUITES``.
        tokenizer: the model's.
        n: number of questions, drawn at random; None takes all.
        shots: worked examples. A prompt that is longer than the model takes fewer.
        path: file of questions; None takes the hub's.
        examples: file of worked examples, beside ``path``.
        seed: of the choice of questions and examples.
        batch_size: rows per forward; None chooses.
        progress: called with the number of continuations done and of all.
        allow_longer: permit prompts beyond ``max_position_embeddings``.

    Returns:
        accuracy, by the comparison that OLMES has for the task ("normalisation"), with standard
        error and 95% interval; accuracy_none, accuracy_bytes, accuracy_characters and accuracy_pmi
        for the others; chance, shots, per-question scores.

    Raises:
        ValueError: no questions, not in the schema, or no worked examples where some were asked
            for.
    """
    suite = SUITES[task]
    questions, source = _load(task, path, suite.split)
    if not questions:
        raise ValueError(f"{task}: no questions in {source}")
    worked = _worked(task, path, examples, shots, seed)
    order = generator(task, "questions", seed).permutation(len(questions)).tolist()
    chosen = questions if n is None else [questions[i] for i in order[:n]]
    shown = [f"{q.text} {q.choices[q.answer].strip()}\n\n" for q in worked]
    problems = [
        Problem(
            lambda count, text=question.text: "".join(shown[:count]) + text,
            len(shown),
            tuple(f" {choice.strip()}" for choice in question.choices),
            question.answer,
        )
        for question in chosen
    ]
    made = choose_by_likelihood(
        model,
        problems,
        tokenizer=tokenizer,
        unconditioned=_UNCONDITIONED,
        batch_size=batch_size,
        progress=progress,
        allow_longer=allow_longer,
    )
    right = made.right[suite.normalisation]
    accuracy, error = mean_and_error(right)
    chance = mean_and_error([1 / len(question.choices) for question in chosen])[0]
    others = {f"accuracy_{way}": mean_and_error(hits)[0] for way, hits in made.right.items()}
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": proportion_interval(sum(right), len(right)),
        "normalisation": suite.normalisation,
        **others,
        "also": [key for key in others if key != f"accuracy_{suite.normalisation}"],
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "n": len(chosen),
        "form": "cloze",
        "shots": {
            "asked": shots,
            "used": {str(count): times for count, times in made.shots.items()},
        },
        "tokens": made.tokens,
        "truncated": 0,
        "haystack": f"questions of {source}",
        "items": right,
    }
