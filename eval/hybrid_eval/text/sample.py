"""One sample of a natural-language task."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .matching import Match


@dataclass(frozen=True)
class TextSample:
    """A prompt with its answer.

    Attributes:
        task: name of the task.
        index: number of the sample in its cell.
        length: maximum tokens of the sample: prompt, answer prefix and generation.
        prompt: input of the model, without ``answer_prefix``.
        answer_prefix: beginning of the answer, which the model continues.
        chat: prompt and prefix in a chat template; None reads the plain text.
        template: "chat" for the tokenizer's own template, or the name of RULER's; None for none.
        special: whether the tokenizer adds its special tokens at the start of the text.
        outputs: the reference answers.
        match: how the answer is scored, see :func:``hybrid_eval.text.matching.string_match``.
        max_new_tokens: number of tokens reserved for generation.
        prompt_tokens: true number of tokens of prompt and prefix, special tokens included.
        slack: unused tokens of ``length``; fewer than one unit of filler.
        filler_tokens: tokens of the first unit of filler that did not fit.
        haystack: source of the filler.
        depth: depth of the (first) needle in [0, 1], if any.
        needle_positions: token index in the prompt at which each answer's evidence begins.
        stop: the model's answer ends before this; None for nowhere.
        details: further information on the sample.
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
    chat: str | None = None
    template: str | None = None
    special: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Prompt and answer prefix, which the model continues."""
        if self.chat is not None:
            return self.chat
        return f"{self.prompt} {self.answer_prefix}" if self.answer_prefix else self.prompt

    @property
    def answer(self) -> str:
        """Reference continuation for teacher forcing."""
        several = self.match in ("all", "words", "last")
        wanted = self.outputs if several else self.outputs[:1]
        space = "" if self.text[-1:].isspace() else " "
        return space + ", ".join(wanted)

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as a flat record, as a data set row."""
        return asdict(self) | {"outputs": list(self.outputs)}
