"""RULER's variable tracking and its two aggregation tasks (arXiv 2404.06654, sections 3.2 and 3.3)."""

import math
import string
from functools import partial
from itertools import pairwise

import numpy as np

from ..seeding import generator
from .counter import Counter
from .fill import alike, cumulate, fill
from .material import NOISE, Filler, Words, distinct, letters
from .ruler_niah import line_context
from .sample import TextSample

_VT_ROOM, _CWE_ROOM, _FWE_ROOM = 30, 120, 50
_HOPS = 4

_VT_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
# the trailing space is part of RULER's prompt
_VT_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {query}, they are: "
)
# noise sentences of the solved example: as many as fit in RULER's 500 tokens, and for short lengths
_VT_EXAMPLE, _VT_SHORT_EXAMPLE = 14, 2
_CWE_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FWE_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


def _chain(rng: np.random.Generator, length: int, taken=()) -> tuple[list[str], list[str], str]:
    """Return the names of a chain, its assignments, and its value."""
    names = distinct(rng, partial(letters, length=length), _HOPS + 1, taken)
    value = str(int(rng.integers(10000, 99999)))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
    return names, lines, value


def _short_context(lines: list[str], noises: int) -> str:
    """Put the lines among fewer noise sentences than there are lines, evenly."""
    text = [NOISE] * noises
    for number, line in enumerate(lines):
        text.insert(number + number * noises // len(lines), line)
    return "\n".join(text)


def vt(
    *, length: int, index: int, seed: int, counter: Counter, filler: Filler, words: Words
) -> TextSample:
    """Variable tracking: one chain of four hops in noise, with a one-shot example before it.

    Each statement and each noise sentence is a separate line. RULER starts at 4096 tokens;
    below 1024 the example is shortened to two noise sentences.

    Raises:
        ValueError: a length that cannot hold the example and the chain.
    """
    rng = generator("vt", seed, length, index)
    # the names of the example have three letters, those of the question five
    shown, shown_lines, shown_value = _chain(rng, 3)
    names, lines, value = _chain(rng, 5)
    example_spots = sorted(rng.random(len(lines)).tolist())
    spots = sorted(rng.random(len(lines)).tolist())
    count = _HOPS + 1
    if length >= 1024:
        hidden = line_context([NOISE] * _VT_EXAMPLE, shown_lines, example_spots)
    else:
        hidden = _short_context(shown_lines, _VT_SHORT_EXAMPLE)
    example = (
        f"{_VT_PROMPT.format(context=hidden, query=shown_value)} "
        f"{_VT_PREFIX.format(count=count, query=shown_value)} {' '.join(shown)}\n\n"
    )
    prefix = _VT_PREFIX.format(count=count, query=value)

    def build(noises: int) -> str:
        hidden = line_context([NOISE] * noises, lines, spots)
        return example + _VT_PROMPT.format(context=hidden, query=value)

    filled = fill(
        lambda noises: counter.text(f"{build(noises)} {prefix}"),
        alike(counter.piece(f"\n{NOISE}"), length // 8 + 1),
        length - _VT_ROOM,
        # no two statements without a noise sentence between them
        minimum=count,
        what=f"vt at length {length}",
    )
    prompt = build(filled.units)
    places = [prompt.index(line, len(example)) for line in lines]
    return TextSample(
        task="vt",
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix=prefix,
        outputs=tuple(names),
        match="all",
        max_new_tokens=_VT_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _VT_ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack="RULER's noise sentence",
        depth=places[0] / len(prompt),
        needle_positions=counter.positions(f"{prompt} {prefix}", places),
        details={"value": value, "hops": _HOPS},
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def cwe(
    *, length: int, index: int, seed: int, counter: Counter, filler: Filler, words: Words
) -> TextSample:
    """Common words: ten words occur often among rare ones; a solved example comes before.

    Repeats are 30 and 3 from 4096 tokens on, 6 and 1 below, as in RULER.

    Raises:
        ValueError: a length that cannot hold the example and the ten words.
    """
    rng = generator("cwe", seed, length, index)
    often, rarely = (30, 3) if length >= 4096 else (6, 1)
    shown_often, shown_rarely, shown_size = (10, 3, 40) if length >= 4096 else (3, 1, 20)
    most = length // (3 * rarely) + 11
    order = [words.single[i] for i in rng.permutation(len(words.single))[: most + shown_size]]
    shown, chosen = order[:shown_size], order[shown_size:]
    shown_list = shown[:10] * shown_often + shown[10:] * shown_rarely
    shown_list = [shown_list[i] for i in rng.permutation(len(shown_list))]
    example = f"{_CWE_PROMPT.format(context=_numbered(shown_list))} {_CWE_PREFIX} "
    example += _numbered(shown[:10]) + "\n"
    common = chosen[:10]
    # each occurrence has its own position, so a longer list is shuffled like a shorter one
    ranks = rng.random((len(chosen), max(often, rarely)))
    times = np.full((len(chosen), 1), rarely)
    times[:10] = often
    used = np.arange(ranks.shape[1]) < times
    which = np.nonzero(used)[0][np.argsort(ranks[used])]

    def build(rare: int) -> str:
        listed = [chosen[i] for i in which[which < 10 + rare].tolist()]
        return example + _CWE_PROMPT.format(context=_numbered(listed))

    # a numbered word is its number, a dot and its pieces
    ordinals = counter.words([f"{20 * i + 100}." for i in range(len(chosen) - 10)])
    rest = zip(counter.words(chosen[10:]), ordinals, strict=True)
    unit_tokens = (rarely * (word + ordinal) for word, ordinal in rest)
    filled = fill(
        lambda rare: counter.text(f"{build(rare)} {_CWE_PREFIX}"),
        cumulate(unit_tokens),
        length - _CWE_ROOM,
        minimum=1,
        what=f"cwe at length {length}",
    )
    if filled.units == len(chosen) - 10 < most - 10:
        raise ValueError(
            f"cwe at length {length}: {len(words.single):,} words ({words.source}) do not fill it, "
            f"only {filled.tokens:,} tokens; give a longer list as a text file, one word a line (the "
            "option words), or ask for a smaller length"
        )
    return TextSample(
        task="cwe",
        index=index,
        length=length,
        prompt=build(filled.units),
        answer_prefix=_CWE_PREFIX,
        outputs=tuple(common),
        match="all",
        max_new_tokens=_CWE_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _CWE_ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=words.source,
        details={"often": often, "rarely": rarely, "rare_words": filled.units},
    )


def fwe(
    *, length: int, index: int, seed: int, counter: Counter, filler: Filler, words: Words
) -> TextSample:
    """Frequent words: coded words whose counts follow a zeta law with exponent 2.

    The most frequent "word" is dots, which do not count; the next three are the answer.

    Raises:
        ValueError: a length at which the third and the fourth word would be equally frequent.
    """
    rng = generator("fwe", seed, length, index)
    size = max((length - _FWE_ROOM) // 50, 6)
    vocabulary = distinct(rng, partial(letters, length=6, alphabet=string.ascii_lowercase), size)
    vocabulary[0] = "..."
    share = np.arange(1, size + 1, dtype=np.float64) ** -2.0 / (math.pi**2 / 6)
    most = 2 * length
    # each occurrence has its own position, so a longer text is shuffled like a shorter one
    ranks = [
        generator("fwe", seed, length, index, i).random(int(most * s)) for i, s in enumerate(share)
    ]

    def counts(total: int) -> list[int]:
        return [int(total * s) for s in share]

    order = np.argsort(np.concatenate(ranks))
    which = np.repeat(np.arange(size), [len(own) for own in ranks])[order]
    times = np.concatenate([np.arange(len(own)) for own in ranks])[order]

    def build(total: int) -> str:
        used = which[times < np.asarray(counts(total))[which]].tolist()
        return _FWE_PROMPT.format(context=" ".join([vocabulary[i] for i in used]))

    per_word = float(share @ counter.words(vocabulary))
    # fractions add up over many words: whole tokens dealt out evenly
    ends = np.floor(max(per_word, 1.0) * np.arange(most + 1)).astype(int)
    filled = fill(
        lambda total: counter.text(f"{build(total)} {_FWE_PREFIX}"),
        ends.tolist(),
        length - _FWE_ROOM,
        minimum=1,
        what=f"fwe at length {length}",
    )
    found = counts(filled.units)
    if not found[1] > found[2] > found[3] > found[4]:
        raise ValueError(
            f"fwe at length {length}: only {filled.units} words fit, the three most frequent are "
            "not set apart; ask for a greater length"
        )
    return TextSample(
        task="fwe",
        index=index,
        length=length,
        prompt=build(filled.units),
        answer_prefix=_FWE_PREFIX,
        outputs=tuple(vocabulary[1:4]),
        match="all",
        max_new_tokens=_FWE_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _FWE_ROOM - filled.tokens,
        filler_tokens=max(filled.next_tokens, 8),
        haystack="coded words",
        details={"words": filled.units},
    )
