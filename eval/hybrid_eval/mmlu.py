"""Multiple choice in MMLU's schema, from the hub or local files, in two forms: letters and cloze.

Letters: the choices are listed as A to D and the model names a letter. That is symbol binding, a
kind of retrieval. Cloze: the model is asked for the text of the answer and never sees the list;
the choice with the largest log-likelihood wins. Cloze is the measure of what a model knows.

Questions: MMLU's own 57 subjects from the hub, five worked examples of each from its ``dev`` split;
or local files, ``*.jsonl`` or ``*.parquet`` with question, choices (list), answer (index or letter) and
optionally subject; or the original CSV (question, A, B, C, D, letter). A folder may have the
original's ``dev`` and ``test`` subfolders: then examples come from ``dev``, five per subject.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .questions import HUB, LETTERS, Item, choose, hub_items, read_items
from .scoring import IGNORE, Progress, position_limit, score
from .stats import above_chance, mean_and_error, wilson
from .tokens import Encoder, continuation_ids

Form = Literal["letters", "cloze"]
# what is left of a prompt without a question: the measure of how likely a text is anyway
_UNCONDITIONED = "Answer:"


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


def _row(tokenizer: Encoder, context: str, text: str) -> dict[str, np.ndarray]:
    ids, start = continuation_ids(tokenizer, context, text)
    row = np.asarray(ids, dtype=np.int64)
    labels = row.copy()
    labels[:start] = IGNORE
    return {"input_ids": row, "labels": labels}


def _rows(
    item: Item, examples: Sequence[Item], form: Form, tokenizer: Encoder, limit: int | None
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Return a row for each choice, and how many examples fitted the model's length."""
    for count in range(len(examples), -1, -1):
        context = prompt(item, examples[:count], form)
        rows = [_row(tokenizer, context, text) for text in _continuations(item, form)]
        longest = max(len(row["input_ids"]) for row in rows)
        if limit is None or longest <= limit or count == 0:
            return rows, count
    raise AssertionError("the loop ends at no examples")


def _accuracies(
    chosen: Sequence[Item],
    likelihoods: Sequence[Sequence[float]],
    unconditioned: Sequence[Sequence[float]] | None,
    form: Form,
) -> dict[str, list[float]]:
    """Return, for each way to compare choices, whether each question is right."""
    found: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": [], "accuracy_norm_chars": []}
    if unconditioned is not None:
        found["accuracy_pmi"] = []
    for number, (item, lls) in enumerate(zip(chosen, likelihoods, strict=True)):
        texts = [text.strip() for text in _continuations(item, form)]
        scores = {
            "accuracy": lls,
            "accuracy_norm": [v / len(t.encode("utf-8")) for v, t in zip(lls, texts, strict=True)],
            "accuracy_norm_chars": [v / len(t) for v, t in zip(lls, texts, strict=True)],
        }
        if unconditioned is not None:
            alone = unconditioned[number]
            scores["accuracy_pmi"] = [a - b for a, b in zip(lls, alone, strict=True)]
        for name, values in scores.items():
            found[name].append(float(int(np.argmax(values)) == item.answer))
    return found


def _subjects(chosen: Sequence[Item], right: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return accuracy, interval and number of questions of each subject."""
    grouped: dict[str, list[float]] = {}
    for item, value in zip(chosen, right, strict=True):
        grouped.setdefault(item.subject, []).append(value)
    return {
        name: {
            "accuracy": sum(values) / len(values),
            "interval": wilson(sum(values), len(values)),
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
        accuracy (largest log-likelihood; over all questions) with standard error and Wilson
        interval, accuracy_macro (mean over subjects), accuracy_norm and accuracy_norm_chars
        (log-likelihood per byte and per character of the choice), accuracy_pmi if asked for,
        gold_bits_per_byte, chance, subjects, shots (asked for; how many questions had how many),
        per-question scores.

    Raises:
        ValueError: no questions, or no worked examples where some were asked for.
    """
    questions, worked = hub_items() if path is None else read_items(path)
    chosen = choose(questions, n, seed)
    limit = None if allow_longer else position_limit(model)
    rows, sizes, used = [], [], []
    for item in chosen:
        examples = _examples(item, worked, shots, HUB if path is None else str(path))
        own, count = _rows(item, examples, form, tokenizer, limit)
        rows += own
        sizes.append(len(own))
        used.append(count)
    alone = [
        _row(tokenizer, _UNCONDITIONED, text)
        for item in chosen
        for text in (_continuations(item, form) if unconditioned else ())
    ]
    scored = score(
        model, [*rows, *alone], batch_size=batch_size, progress=progress, allow_longer=allow_longer
    )
    totals = [-float(row.nll.sum()) for row in scored]
    edges = np.cumsum([0, *sizes])
    likelihoods = [totals[a:b] for a, b in pairwise(edges)]
    after = edges + len(rows)
    anyway = [totals[a:b] for a, b in pairwise(after)]
    found = _accuracies(chosen, likelihoods, anyway if unconditioned else None, form)
    right = found["accuracy"]
    accuracy, error = mean_and_error(right)
    subjects = _subjects(chosen, right)
    bits = [
        -lls[item.answer] / len(_continuations(item, form)[item.answer].strip().encode("utf-8"))
        for item, lls in zip(chosen, likelihoods, strict=True)
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    chance = float(np.mean([1 / len(item.choices) for item in chosen]))
    others = [name for name in found if name != "accuracy"]
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": wilson(sum(right), len(right)),
        "accuracy_macro": mean_and_error([s["accuracy"] for s in subjects.values()])[0],
        **{name: mean_and_error(found[name])[0] for name in others},
        **{f"{name}_interval": wilson(sum(found[name]), len(chosen)) for name in others},
        "also": ["accuracy_macro", *others],
        "gold_bits_per_byte": mean_and_error(bits)[0] / math.log(2),
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "n": len(chosen),
        "form": form,
        "subjects": subjects,
        "shots": {
            "asked": shots,
            "used": {str(count): times for count, times in sorted(Counter(used).items())},
        },
        "tokens": {"min": min(lengths), "max": max(lengths)},
        "truncated": 0,
        "haystack": f"questions of {HUB if path is None else Path(path).name}",
        "items": right,
    }
