"""Comparison of generated text with reference answers: the metrics of RULER and RULER v2."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

# all, any: RULER's (NVIDIA/RULER, scripts/eval/synthetic/constants.py)
# words, part, last, letter: RULER v2's (NVIDIA-NeMo/Skills, evaluator/ruler.py and evaluator/mcq.py)
Match = Literal["all", "any", "words", "part", "last", "letter"]

_CONTROL = re.compile(r"[\x00-\x1f]")
_DOCUMENT = re.compile(r"Document \d+:(?:.*\n)+?\n")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_LETTER = re.compile(r"\b[A-Z]\b")
_NAMED = re.compile(r"(?i)[*_]{0,2}Answer[*_]{0,2}\s*:[\s*_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")


def word_errors(answer: str, reference: str) -> float:
    """Return the word error rate: word edits that turn an answer into the reference, per word of
    it.

    Raises:
        ValueError: a reference without words.
    """
    said, wanted = answer.split(), reference.split()
    if not wanted:
        raise ValueError("word error rate: the reference has no words")
    row = list(range(len(wanted) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1] / len(wanted)


def _contains(outputs: Sequence[str], answer: str) -> list[float]:
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return [float(output.lower() in text) for output in outputs]


def _nearly(outputs: Sequence[str], answer: str) -> list[float]:
    """Return 1 for each output that the answer contains, else 1 less the word error rate."""
    text = answer.lower()
    return [
        1.0 if output.lower() in text else max(0.0, 1.0 - word_errors(text, output.lower()))
        for output in outputs
    ]


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _letter(outputs: Sequence[str], answer: str) -> float:
    """Return whether the last boxed letter, else the last one after "Answer:", is correct."""
    letters: list[str] = []
    for boxed in _BOXED.findall(answer)[-1:]:
        letters = _LETTER.findall(boxed.upper() if len(boxed.strip()) == 1 else boxed)
    letters = letters or [letter.upper() for letter in _NAMED.findall(answer)]
    return float(bool(letters) and letters[-1] in outputs)


_METRICS: dict[Match, Callable[[Sequence[str], str], float]] = {
    "all": lambda outputs, answer: _mean(_contains(outputs, answer)),
    "any": lambda outputs, answer: max(_contains(outputs, answer)),
    "words": lambda outputs, answer: _mean(_nearly(outputs, answer)),
    # documents that the model copies before it answers do not count
    "part": lambda outputs, answer: max(_nearly(outputs, _DOCUMENT.sub("", answer))),
    # of what the model copies, its last paragraph is the answer
    "last": lambda outputs, answer: _mean(_nearly(outputs, answer.split("\n\n")[-1])),
    "letter": _letter,
}


def string_match(outputs: Sequence[str], answer: str, match: Match) -> float:
    """Score an answer in [0, 1], ignoring case.

    Args:
        outputs: the reference answers.
        answer: the generated text.
        match: "all" gives the share of outputs found in the answer, "any" whether one is (control
            characters count as line breaks). "words" is the mean over outputs of 1 where the answer
            contains it, else 1 less the word error rate; "part" is the best output by the same
            measure, "last" takes the last paragraph only. "letter" is a multiple choice.
    """
    return _METRICS[match](outputs, answer)
