"""What prompts are made of: words for keys, and filler. Each part says where it came from."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..corpus import Corpus, load_corpus, stdlib_documents
from ..hub import load_hub

# filler of RULER's "repeat" haystack and of its variable tracking
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Words:
    """Word lists for keys ("adjective-noun") and for word counting.

    Attributes:
        first: first halves of keys.
        second: second halves.
        single: words to count.
        source: where they came from.
        official: whether RULER takes its words from there.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    single: tuple[str, ...]
    source: str
    official: bool

    def key(self, rng: np.random.Generator) -> str:
        """Draw a key of two words."""
        return f"{_pick(rng, self.first)}-{_pick(rng, self.second)}"


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def distinct(rng: np.random.Generator, draw, count: int, taken=()) -> list[str]:
    """Draw ``count`` different things that are not in ``taken``."""
    seen, found = set(taken), []
    while len(found) < count:
        thing = draw(rng)
        if thing not in seen:
            seen.add(thing)
            found.append(thing)
    return found


def number(rng: np.random.Generator, digits: int = 7) -> str:
    """Draw a number of that many digits."""
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def uuid4(rng: np.random.Generator) -> str:
    """Draw a version 4 UUID."""
    value = int.from_bytes(rng.bytes(16), "big")
    value = value & ~(0xF << 76) | 4 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def letters(rng: np.random.Generator, length: int, alphabet: str = string.ascii_uppercase) -> str:
    """Draw a string of letters."""
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


@lru_cache(maxsize=1)
def python_words() -> Words:
    """Return words that occur in the standard library's sources; needs no download."""
    text = " ".join(document.text for document in stdlib_documents("heldout"))
    found = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    half = len(found) // 2
    # every second word, so that both halves of a key run through the alphabet
    return Words(
        tuple(found[0 : 2 * half : 2]),
        tuple(found[1 : 2 * half : 2]),
        tuple(found),
        f"{len(found)} words of the Python standard library",
        official=False,
    )


@lru_cache(maxsize=1)
def wonder_words() -> Words:
    """Return the words that RULER is defined with.

    Raises:
        ValueError: the package wonderwords is not installed.
    """
    try:
        # an optional package: nothing but RULER's own words needs it
        from wonderwords import RandomWord  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "RULER draws its words from the package wonderwords, which is not installed: "
            "pip install wonderwords; or run the task under its own name, long_..."
        ) from error
    lists = RandomWord()._categories
    nouns, adjectives, verbs = (lists[name] for name in ("noun", "adjective", "verb"))
    single = sorted({*nouns, *adjectives, *verbs})
    return Words(
        tuple(sorted(set(adjectives))),
        tuple(sorted(set(nouns))),
        tuple(single),
        "wonderwords",
        official=True,
    )


@dataclass(frozen=True, eq=False)
class Filler:
    """Words of a long text, in order. Two are equal if they are one: hashing costs nothing.

    Attributes:
        words: the text, split at white space.
        source: where it came from.
        official: whether it is the essays that RULER is defined with.
    """

    words: tuple[str, ...]
    source: str
    official: bool = False

    @cached_property
    def sentences(self) -> "tuple[tuple[int, ...], tuple[str, ...]]":
        """Ends (the number of words up to each) and texts of the sentences that have an end."""
        ends = sentence_ends(self.words)
        starts = (0, *ends[:-1])
        texts = [" ".join(self.words[a:b]) for a, b in zip(starts, ends, strict=True)]
        return ends, tuple(texts)

    @lru_cache(maxsize=4)  # noqa: B019 - a handful of fillers, kept for the whole run anyway
    def repeated(self, words: int) -> "Filler":
        """Return this text, gone round until there are at least so many words."""
        times = -(-words // len(self.words))
        return self if times <= 1 else Filler(self.words * times, self.source, self.official)


def sentence_ends(words: Sequence[str]) -> tuple[int, ...]:
    """Return, for every sentence of a text, the number of words up to its end."""
    return tuple(i + 1 for i, word in enumerate(words) if re.search(r"[.!?][\"')\]]*$", word))


def filler_from(corpus: Corpus, *, official: bool = False) -> Filler:
    """Split a corpus into words.

    Raises:
        ValueError: there is no word in it.
    """
    words = tuple(corpus.text.split())
    if not words:
        raise ValueError(f"no word in {corpus.description}")
    return Filler(words, corpus.description, official)


@lru_cache(maxsize=1)
def python_filler() -> Filler:
    """Return the held-out part of the standard library's sources as filler."""
    return filler_from(load_corpus(None))


@lru_cache(maxsize=1)
def essays() -> Filler:
    """Return Paul Graham's essays, RULER's haystack, from the hub.

    Raises:
        ValueError: the hub cannot be reached.
    """
    rows = load_hub(
        "baber/paul_graham_essays",
        split="train",
        what="RULER's haystack of Paul Graham's essays",
        way_out="run the task under its own name, long_..., with text that is at hand",
    )
    words = " ".join(str(row["text"]) for row in rows).split()
    return Filler(tuple(words), "Paul Graham essays", official=True)
