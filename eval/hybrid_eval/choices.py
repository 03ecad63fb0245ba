"""Multiple choice by likelihood: the answer is the choice with the largest likelihood.

Likelihoods of texts of different length are not directly comparable. Four normalisations are
reported (Gu et al. 2024, OLMES, arXiv 2406.08446, section 3.2): log-likelihood, per byte, per
character, and minus the log-likelihood without the question (PMI).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from .scoring import IGNORE, Progress, position_limit, score
from .tokens import Encoder, continuation_ids

Normalisation = Literal["none", "bytes", "characters", "pmi"]


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        prompt: function from a number of worked examples to the prompt.
        examples: number of available worked examples.
        continuations: the choices as they follow the prompt, each with its leading space.
        answer: index of the correct choice.
    """

    prompt: Callable[[int], str]
    examples: int
    continuations: tuple[str, ...]
    answer: int


class Chosen(NamedTuple):
    """Choices of a model.

    Attributes:
        right: for each normalisation, 1.0 or 0.0 for each question.
        likelihoods: log-likelihood of every choice of every question, in nats.
        shots: number of questions by number of worked examples.
        tokens: minimum and maximum number of tokens of a prompt with a choice.
    """

    right: dict[Normalisation, list[float]]
    likelihoods: list[list[float]]
    shots: dict[int, int]
    tokens: dict[str, int]


def _row(tokenizer: Encoder, context: str, text: str) -> dict[str, np.ndarray]:
    ids, start = continuation_ids(tokenizer, context, text)
    row = np.asarray(ids, dtype=np.int64)
    labels = row.copy()
    labels[:start] = IGNORE
    return {"input_ids": row, "labels": labels}


def _rows(
    problem: Problem, tokenizer: Encoder, limit: int | None
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Return a row for each choice, and the number of examples that fit in the model's length."""
    for count in range(problem.examples, -1, -1):
        context = problem.prompt(count)
        rows = [_row(tokenizer, context, text) for text in problem.continuations]
        longest = max(len(row["input_ids"]) for row in rows)
        if limit is None or longest <= limit or count == 0:
            return rows, count
    raise AssertionError("unreachable: zero examples always fit")


def _scores(
    problem: Problem, lls: Sequence[float], alone: Sequence[float]
) -> dict[Normalisation, list[float]]:
    """Return the score of every choice, for each normalisation."""
    texts = [text.strip() for text in problem.continuations]
    found: dict[Normalisation, list[float]] = {
        "none": list(lls),
        "bytes": [v / len(t.encode("utf-8")) for v, t in zip(lls, texts, strict=True)],
        "characters": [v / len(t) for v, t in zip(lls, texts, strict=True)],
    }
    if alone:
        found["pmi"] = [a - b for a, b in zip(lls, alone, strict=True)]
    return found


def choose_by_likelihood(
    model,
    problems: Sequence[Problem],
    *,
    tokenizer: Encoder,
    unconditioned: str | None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> Chosen:
    """Return the answers of a model to every question.

    Args:
        model: a causal language model.
        problems: the questions. Worked examples are removed from prompts that exceed the model's
            length.
        tokenizer: tokenizer of the model.
        unconditioned: prompt without a question, for the unconditional likelihood of a choice;
            None to omit "pmi".
        batch_size: rows per forward; None for automatic.
        progress: called with the number of completed and of all continuations.
        allow_longer: permit prompts beyond ``max_position_embeddings``.

    Raises:
        ValueError: as :func:``hybrid_eval.scoring.score``.
    """
    limit = None if allow_longer else position_limit(model)
    made = [_rows(problem, tokenizer, limit) for problem in problems]
    rows = [row for own, _ in made for row in own]
    # equal continuations without a question ("yes", "A") are scored once
    texts = [text for problem in problems for text in problem.continuations]
    apart = list(dict.fromkeys(texts)) if unconditioned is not None else []
    alone = [_row(tokenizer, unconditioned or "", text) for text in apart]
    scored = score(
        model, [*rows, *alone], batch_size=batch_size, progress=progress, allow_longer=allow_longer
    )
    totals = [-float(row.nll.sum()) for row in scored]
    anyway = dict(zip(apart, totals[len(rows) :], strict=True))
    edges = np.cumsum([0, *(len(own) for own, _ in made)]).tolist()
    likelihoods = [totals[a:b] for a, b in pairwise(edges)]
    right: dict[Normalisation, list[float]] = {}
    for problem, lls in zip(problems, likelihoods, strict=True):
        before = [anyway[text] for text in problem.continuations] if apart else []
        for name, values in _scores(problem, lls, before).items():
            hit = float(int(np.argmax(values)) == problem.answer)
            right.setdefault(name, []).append(hit)
    lengths = [len(row["input_ids"]) for row in rows]
    shots = dict(sorted(Counter(count for _, count in made).items()))
    return Chosen(right, likelihoods, shots, {"min": min(lengths), "max": max(lengths)})
