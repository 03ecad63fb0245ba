"""Multiple choice in MMLU's schema, from the hub or local files, in two forms: letters and cloze.

Letters: the choices are listed as A to D and the model names a letter. That is symbol binding, a
kind of retrieval. Cloze: the model is asked for the text of the answer and never sees the list;
the choice with the largest log-likelihood wins. Cloze is the measure of what a model knows.

Questions: MMLU's own 57 subjects from the hub, five worked examples of each from its ``dev`` split;
or local files, ``*.jsonl`` or ``*.parquet`` with question, choices (list), answer (index or
letter) and optionally subject; or the original CSV (question, A, B, C, D, letter). A folder may
have the original's ``dev`` and ``test`` subfolders: then examples come from ``dev``, five per
subject.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .choices import Normalisation, Problem, choose_by_likelihood
from .questions import HUB, LETTERS, Item, choose, hub_items, read_items
from .scoring import Progress
from .stats import above_chance, mean_and_error, proportion_interval
from .tokens import Encoder

Form = Literal["letters", "cloze"]
# what is left of a prompt without a question: the measure of how likely a text is anyway
_UNCONDITIONED = "Answer:"
_KEYS: dict[Normalisation, str] = {
    "none": "accuracy",
    "bytes": "accuracy_norm",
    "characters": "accuracy_norm_chars",
    "pmi": "accuracy_pmi",
}


def _block(item: Item, form: Form) -> str:
    if form == "cloze":
        return f"Question: {item.question.strip()}\nAnswer:"
    listed = "".join(f"\n{LETTERS[i]}. {text}" for i, text in enumerate(item.choices))
    return f"{item.question.strip()}{listed}\nAnswer:"


def _continuations(item: Item, form: Form) -> list[str]:
    if form == "cloze":
        return [f" {choice.strip()}" for choice in item.choices]
    return [f" {LETTERS[i]}" for i in range(len(item.choices))]


def prompt(item: Item, examples: Sequence[Item], form: Form) -> str:
    """Return the prompt of a question: a headline and examples as MMLU has them, then itself."""
    subject = item.subject.replace("_", " ")
    kind = "multiple choice questions" if form == "letters" else "questions"
    head = f"The following are {kind} (with answers) about {subject}.\n\n"
    shown = "".join(
        f"{_block(shot, form)}{_continuations(shot, form)[shot.answer]}\n\n" for shot in examples
    )
    return head + shown + _block(item, form)


def _examples(item: Item, worked: dict[str, list[Item]], shots: int, source: str) -> list[Item]:
    """Return the worked examples of a question's own subject.

    Raises:
        ValueError: examples were asked for and there are none.
    """
    found = worked.get(item.subject, [])[:shots]
    if shots and not found:
        have = ", ".join(sorted(worked)[:5]) or "none at all"
        raise ValueError(
            f"{source}: {shots} worked example(s) asked for, but none of subject {item.subject!r} in "
            f"a dev folder (found: {have}); add dev/, or ask for none with the option shots=0"
        )
    return found


def _problem(item: Item, examples: Sequence[Item], form: Form) -> Problem:
    return Problem(
        lambda count: prompt(item, examples[:count], form),
        len(examples),
        tuple(_continuations(item, form)),
        item.answer,
    )


def _subjects(chosen: Sequence[Item], right: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return accuracy, interval and number of questions of each subject."""
    grouped: dict[str, list[float]] = {}
    for item, value in zip(chosen, right, strict=True):
        grouped.setdefault(item.subject, []).append(value)
    return {
        name: {
            "accuracy": sum(values) / len(values),
            "interval": proportion_interval(sum(values), len(values)),
            "n": len(values),
        }
        for name, values in sorted(grouped.items())
    }


def evaluate_mmlu(
    model,
    *,
    form: Form,
    tokenizer: Encoder,
    path: str | None = None,
    n: int | None = None,
    shots: int = 5,
    unconditioned: bool = False,
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
        shots: worked examples per question, from the ``dev`` part. A prompt that is longer than the
            model takes fewer, which the result says.
        unconditioned: also compare choices by what the question adds to their likelihood (PMI).
        seed: of the choice of questions.
        batch_size: rows per forward; None chooses.
        progress: called with the number of continuations done and of all.
        allow_longer: permit prompts beyond ``max_position_embeddings``.

    Returns:
        accuracy (largest log-likelihood; over all questions) with standard error and 95%
        interval, accuracy_macro (mean over subjects), accuracy_norm and accuracy_norm_chars
        (log-likelihood per byte and per character of the choice), accuracy_pmi if asked for,
        gold_bits_per_byte, chance, subjects, shots (asked for; how many questions had how many),
        per-question scores.

    Raises:
        ValueError: no questions, or no worked examples where some were asked for.
    """
    questions, worked = hub_items() if path is None else read_items(path)
    chosen = choose(questions, n, seed)
    source = HUB if path is None else str(path)
    problems = [_problem(item, _examples(item, worked, shots, source), form) for item in chosen]
    made = choose_by_likelihood(
        model,
        problems,
        tokenizer=tokenizer,
        unconditioned=_UNCONDITIONED if unconditioned else None,
        batch_size=batch_size,
        progress=progress,
        allow_longer=allow_longer,
    )
    found = {_KEYS[way]: values for way, values in made.right.items()}
    right = found["accuracy"]
    accuracy, error = mean_and_error(right)
    subjects = _subjects(chosen, right)
    bits = [
        -lls[own.answer] / len(own.continuations[own.answer].strip().encode("utf-8"))
        for own, lls in zip(problems, made.likelihoods, strict=True)
    ]
    chance = float(np.mean([1 / len(item.choices) for item in chosen]))
    others = [name for name in found if name != "accuracy"]
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": proportion_interval(sum(right), len(right)),
        "accuracy_macro": mean_and_error([s["accuracy"] for s in subjects.values()])[0],
        **{name: mean_and_error(found[name])[0] for name in others},
        **{
            f"{name}_interval": proportion_interval(sum(found[name]), len(chosen))
            for name in others
        },
        "also": ["accuracy_macro", *others],
        "gold_bits_per_byte": mean_and_error(bits)[0] / math.log(2),
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "n": len(chosen),
        "form": form,
        "subjects": subjects,
        "shots": {
            "asked": shots,
            "used": {str(count): times for count, times in made.shots.items()},
        },
        "tokens": made.tokens,
        "truncated": 0,
        "haystack": f"questions of {HUB if path is None else Path(path).name}",
        "items": right,
    }
