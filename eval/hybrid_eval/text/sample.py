"""One sample of a task in words, and the tokens it takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..tokens import Encoder

Match = Literal["all", "any"]


@dataclass(frozen=True)
class TextSample:
    """A prompt with its answer.

    Attributes:
        task: name of the task.
        index: number of the sample in its cell.
        length: tokens the sample may take: prompt, answer prefix and generation.
        prompt: what the model reads, without ``answer_prefix``.
        answer_prefix: how the answer begins; the model continues it.
        outputs: the right answers.
        match: "all" scores the share of outputs found in the answer, "any" whether one is.
        max_new_tokens: room kept for generation.
        prompt_tokens: true number of tokens of prompt and prefix, special tokens included.
        slack: tokens that are left of ``length``; smaller than one unit of filler.
        filler_tokens: tokens of the unit of filler that no longer fitted.
        haystack: source of the filler.
        depth: of the (first) needle in [0, 1], where there is one.
        needle_positions: token index in the prompt at which each answer's evidence begins.
        stop: the model's answer ends before this; None for nowhere.
        details: what else a solver or a reader may want to know.
    """

    task: str
    index: int
    length: int
    prompt: str
    answer_prefix: str
    outputs: tuple[str, ...]
    match: Match
    max_new_tokens: int
    prompt_tokens: int
    slack: int
    filler_tokens: int
    haystack: str
    depth: float | None = None
    needle_positions: tuple[int, ...] = ()
    stop: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Prompt and answer prefix: what the model continues."""
        return f"{self.prompt} {self.answer_prefix}" if self.answer_prefix else self.prompt

    @property
    def answer(self) -> str:
        """The reference continuation for teacher forcing."""
        wanted = self.outputs if self.match == "all" else self.outputs[:1]
        return " " + ", ".join(wanted)

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as a flat record, as a data set row."""
        return asdict(self) | {"outputs": list(self.outputs)}


def ends_with_special(tokenizer: Encoder, ids: Sequence[int]) -> bool:
    """Whether the tokenizer closed the text with a token after which nothing would follow."""
    end = getattr(tokenizer, "eos_token_id", None)
    return end is not None and len(ids) > 1 and ids[-1] == end


def prompt_ids(tokenizer: Encoder, text: str) -> list[int]:
    """Return ids with the special tokens that the tokenizer puts in front, none behind."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ends_with_special(tokenizer, ids) else ids


class Counter:
    """Counts tokens, and remembers the counts of short pieces and the last few prompts."""

    def __init__(self, tokenizer: Encoder):
        self.tokenizer = tokenizer
        self._pieces: dict[str, int] = {}
        self._recent: dict[str, Any] = {}
        self._words: dict[int, tuple[Sequence[str], list[int]]] = {}

    def _encode(self, text: str) -> Any:
        if text not in self._recent:
            if len(self._recent) >= 4:
                self._recent.pop(next(iter(self._recent)))
            self._recent[text] = self.tokenizer(
                text, verbose=False, return_attention_mask=False, return_token_type_ids=False
            )
        return self._recent[text]

    def text(self, text: str) -> int:
        """Tokens of a whole prompt, without a special token at its end."""
        ids = self._encode(text)["input_ids"]
        return len(ids) - ends_with_special(self.tokenizer, ids)

    def piece(self, piece: str) -> int:
        """Tokens that a piece takes inside a text; remembered."""
        if piece not in self._pieces:
            self._pieces[piece] = self.count(piece)
        return self._pieces[piece]

    def count(self, piece: str) -> int:
        """Tokens that a piece takes inside a text, for a piece that will not be asked again."""
        return len(self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    def words(self, words: Sequence[str], most: int) -> list[int]:
        """Tokens that each of the first ``most`` words takes inside a text.

        Remembered for this very sequence, which is kept so that its id stays its own.
        """
        _, counts = self._words.setdefault(id(words), (words, []))
        counts += [self.piece(f" {word}") for word in words[len(counts) : most]]
        return counts[:most]

    def positions(self, text: str, places: Sequence[int]) -> tuple[int, ...]:
        """Index of the token in which each character lies; ``text`` as it was counted last."""
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self._encode(text)
            found = [encoded.char_to_token(place) for place in places]
            if all(token is not None for token in found):
                return tuple(found)
        return tuple(self.text(text[:place]) for place in places)


def string_match(sample_outputs: Sequence[str], answer: str, match: Match) -> float:
    """Score an answer as RULER does, ignoring case: share of the outputs in it, or any of them."""
    found = [output.lower() in answer.lower() for output in sample_outputs]
    return float(any(found)) if match == "any" else sum(found) / len(found)
