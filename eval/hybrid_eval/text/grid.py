"""Retrieval tasks of this package: ``niah_grid`` (depth x length), ``kv_recall`` (a phone book)."""

from collections.abc import Callable

from ..seeding import generator
from .counter import Counter
from .fill import alike, cumulate, fill
from .material import Filler, Words, distinct, numbers
from .sample import TextSample

_ROOM = 16


def haystack_words(filler: Filler, start: int, count: int) -> list[str]:
    """Return ``count`` words from ``start``, wrapping at the end."""
    size = len(filler.words)
    return [filler.words[(start + i) % size] for i in range(count)]


def niah_grid(
    *,
    length: int,
    depth: float,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
) -> TextSample:
    """Hide one sentence with a number at exactly ``depth`` of a text.

    The needle is between two words of the filler, at round(depth * number of words).

    Raises:
        ValueError: depth outside [0, 1], or a length that holds no needle.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    rng = generator("niah_grid", seed, length, depth, index)
    (key,), (value,) = words.keys(rng, 1), numbers(rng, 1)
    needle = f"The special magic number for {key} is: {value}."
    hay = haystack_words(filler, int(rng.integers(len(filler.words))), length)
    head = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    question = f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    prefix = f"The special magic number for {key} mentioned in the provided text is"

    def build(units: int) -> tuple[str, int]:
        place = round(depth * units)
        before = head + " ".join(hay[:place]) + (" " if place else "")
        after = "".join(f" {word}" for word in hay[place:units])
        return before + needle + after + question, len(before)

    filled = fill(
        lambda units: counter.text(f"{build(units)[0]} {prefix}"),
        cumulate(counter.words(hay)),
        length - _ROOM,
        minimum=0,
        what=f"niah_grid at length {length}",
    )
    prompt, place = build(filled.units)
    return TextSample(
        task="niah_grid",
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix=prefix,
        outputs=(value,),
        match="all",
        max_new_tokens=_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=filler.source,
        depth=depth,
        needle_positions=counter.positions(f"{prompt} {prefix}", [place]),
        details={"key": key},
    )


def kv_recall(
    *,
    length: int,
    depth: float,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
    pairs: int | None = None,
) -> TextSample:
    """List a phone book and look up one entry (Waleffe et al., arXiv 2406.07887, section 3.3).

    The book fills ``length``, or has exactly ``pairs`` entries; the queried entry is at index
    round(depth * (entries - 1)).

    Raises:
        ValueError: depth outside [0, 1], or a length that holds no book of that size.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    rng = generator("kv_recall", seed, length, depth, index)
    most = length // 6 + 2 if pairs is None else pairs

    names = distinct(rng, words.names, most)
    phones = numbers(rng, most)
    entries = [f"{who}: {phone}" for who, phone in zip(names, phones, strict=True)]
    few = entries[:8]
    head = "Here is a phone book. Make sure to memorize it.\n"

    def build(units: int) -> tuple[str, str, int]:
        target = round(depth * (units - 1))
        book = head + "\n".join(entries[:units])
        question = f"\nWhat is the phone number of {names[target]} in the phone book?"
        return book + question, f"The phone number of {names[target]} is", target

    def tokens(units: int) -> int:
        prompt, prefix, _ = build(units)
        return counter.text(f"{prompt} {prefix}")

    filled = fill(
        tokens,
        alike(counter.count("\n" + "\n".join(few)) // len(few), most),
        length - _ROOM,
        minimum=1 if pairs is None else pairs,
        what=f"kv_recall at length {length}",
        measure=lambda i: counter.count("\n" + entries[i]),
    )
    prompt, prefix, target = build(filled.units)
    place = len(head) + sum(len(entry) + 1 for entry in entries[:target])
    return TextSample(
        task="kv_recall",
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix=prefix,
        outputs=(entries[target].rsplit(": ", 1)[1],),
        match="all",
        max_new_tokens=_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=f"phone book of {words.source}",
        depth=depth,
        needle_positions=counter.positions(f"{prompt} {prefix}", [place]),
        details={"pairs": filled.units, "key": names[target]},
    )


Maker = Callable[..., TextSample]
