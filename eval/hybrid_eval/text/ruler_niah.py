"""The eight needle tasks of RULER (arXiv 2404.06654, table 2 and appendix B).

Prompt, needle sentence, depths and haystacks follow NVIDIA's definition. The only differences are
that each sample has its own random generator, and that the length is filled exactly.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..seeding import generator
from .counter import Counter
from .fill import alike, fill
from .material import NOISE, Filler, Words, distinct, numbers, uuids
from .sample import TextSample

_ROOM = 128
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
# depths of needles, in percent of the sentences
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclass(frozen=True)
class NiahKind:
    """One row of RULER's table of needle tasks."""

    haystack: Literal["repeat", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH: dict[str, NiahKind] = {
    "niah_single_1": NiahKind("repeat"),
    "niah_single_2": NiahKind("essay"),
    "niah_single_3": NiahKind("essay", value="uuids"),
    "niah_multikey_1": NiahKind("essay", keys=4),
    "niah_multikey_2": NiahKind("needle"),
    "niah_multikey_3": NiahKind("needle", key="uuids", value="uuids"),
    "niah_multivalue": NiahKind("essay", values=4),
    "niah_multiquery": NiahKind("essay", keys=4, queries=4),
}


def _sentences(filler: Filler, words: int) -> list[str]:
    """Split the first ``words`` words into sentences; the last may be truncated."""
    ends, texts = filler.sentences
    whole = bisect_right(ends, words)
    start = ends[whole - 1] if whole else 0
    rest = filler.words[start:words]
    return [*texts[:whole], " ".join(rest)] if rest else list(texts[:whole])


def _essay_context(
    filler: Filler, words: int, needles: Sequence[str], depths: Sequence[int]
) -> str:
    """Put needles between the sentences of the first ``words`` words, at sorted depths."""
    sentences = _sentences(filler, words)
    pieces, last = [], 0
    for needle, depth in zip(needles, sorted(depths), strict=True):
        cut = int(len(sentences) * depth / 100)
        pieces += [*sentences[last:cut], needle]
        last = cut
    return " ".join([*pieces, *sentences[last:]])


def line_context(lines: Sequence[str], needles: Sequence[str], spots: Sequence[float]) -> str:
    """Put each needle before another line; ``spots`` in [0, 1) choose the lines."""
    text = list(lines)
    lowest = -1
    order = sorted(range(len(needles)), key=lambda i: spots[i])
    places = []
    for rank, i in enumerate(order):
        # a separate line for each needle, with enough lines left for the remaining needles
        last = len(lines) - (len(order) - rank)
        lowest = min(max(int(spots[i] * len(lines)), lowest + 1), last)
        places.append((lowest, needles[i]))
    for place, needle in reversed(places):
        text.insert(place, needle)
    return "\n".join(text)


def _singular(text: str) -> str:
    """Word the prompt for one key and one value, as RULER does."""
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def ruler_niah(
    name: str,
    *,
    length: int,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
) -> TextSample:
    """Make one sample of a needle task.

    Args:
        name: a key of :data:``NIAH``.
        length: tokens of prompt, prefix and generation.
        index: of the sample.
        seed: of the run.
        counter: of tokens.
        filler: essays, for the tasks that hide needles in them.
        words: for keys.

    Raises:
        ValueError: a length that cannot hold the needles.
    """
    kind = NIAH[name]
    rng = generator(name, seed, length, index)

    draw_key = uuids if kind.key == "uuids" else words.keys
    draw_value = uuids if kind.value == "uuids" else numbers
    keys = distinct(rng, draw_key, kind.keys)
    values = distinct(rng, draw_value, kind.keys * kind.values)
    table = {key: values[i * kind.values : (i + 1) * kind.values] for i, key in enumerate(keys)}
    needles = [
        _NEEDLE.format(kind=kind.value, key=key, value=value)
        for key in keys
        for value in table[key]
    ]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = [keys[i] for i in rng.permutation(kind.keys)[: kind.queries]]
    outputs = tuple(value for key in asked for value in table[key])
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    depths = rng.choice(_DEPTHS, len(needles), replace=False).tolist()
    spots = rng.random(len(needles)).tolist()
    template, prefix, noun = _TEMPLATE, _PREFIX, kind.value
    if kind.queries * kind.values == 1:
        template, noun = _singular(template), kind.value[:-1]
        prefix = prefix.replace(" are", " is")
    prefix = prefix.format(kind=noun, query=query)
    head = template.format(kind=noun, context="\0", query=query)
    start, end = head.split("\0")

    lines: list[str] = []
    most = length if kind.haystack == "essay" else length // 8 + len(needles) + 1
    if kind.haystack == "essay":
        filler = filler.repeated(most)
        prefix_tokens = counter.prefix(filler.words, most)
    elif kind.haystack == "repeat":
        lines = [NOISE] * most
        prefix_tokens = alike(counter.piece("\n" + NOISE), most)
    else:
        # lines have about equal length, so only a few are counted
        shortest = counter.piece("\n" + needles[0])
        most = length // max(shortest - 4, 1) + len(needles) + 1
        others = distinct(rng, draw_key, most, taken=keys)
        lines = [
            _NEEDLE.format(kind=kind.value, key=key, value=value)
            for key, value in zip(others, draw_value(rng, most), strict=True)
        ]
        few = lines[:8]
        average = counter.count("\n" + "\n".join(few)) // len(few)
        prefix_tokens = alike(average, most)

    def build(units: int) -> str:
        if kind.haystack == "essay":
            return start + _essay_context(filler, units, needles, depths) + end
        return start + line_context(lines[:units], needles, spots) + end

    filled = fill(
        lambda units: counter.text(f"{build(units)} {prefix}"),
        prefix_tokens,
        length - _ROOM,
        minimum=len(needles),
        what=f"{name} at length {length}",
        measure=(lambda i: counter.count("\n" + lines[i])) if kind.haystack == "needle" else None,
    )
    prompt = build(filled.units)
    evidence = [
        prompt.index(_NEEDLE.format(kind=kind.value, key=key, value=value))
        for key in asked
        for value in table[key]
    ]
    context_length = max(len(prompt) - len(start) - len(end), 1)
    return TextSample(
        task=name,
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix=prefix,
        outputs=outputs,
        match="all",
        max_new_tokens=_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack={"repeat": "RULER's noise sentence", "needle": "other needles"}.get(
            kind.haystack, filler.source
        ),
        depth=min(1.0, max(0.0, (evidence[0] - len(start)) / context_length)),
        needle_positions=counter.positions(f"{prompt} {prefix}", evidence),
        details={"queries": asked},
    )
