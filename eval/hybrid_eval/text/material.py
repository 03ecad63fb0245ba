"""Material of prompts: words for keys, and filler, each with its source."""

import json
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from uuid import UUID

import numpy as np

from ..corpus import Corpus, load_corpus, read_text, stdlib_documents
from ..hub import load_hub

# filler of RULER's "repeat" haystack and of its variable tracking
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

ESSAYS_HUB = "baber/paul_graham_essays"

# Number of values drawn at once, which is ten times faster than single draws
Draw = Callable[[np.random.Generator, int], list[str]]


@dataclass(frozen=True)
class Words:
    """Word lists for keys ("adjective-noun") and for word counting.

    Attributes:
        first: first halves of keys.
        second: second halves.
        single: words to count.
        source: source of the words.
        official: whether RULER uses this source.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    single: tuple[str, ...]
    source: str
    official: bool

    def keys(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw keys of two words."""
        sizes = np.tile([len(self.first), len(self.second)], count)
        drawn = iter(rng.integers(sizes).tolist())
        return [f"{self.first[i]}-{self.second[j]}" for i, j in zip(drawn, drawn, strict=True)]

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw names of two words, with capitals."""
        pairs = (key.split("-", 1) for key in self.keys(rng, count))
        return [f"{first.capitalize()} {last.capitalize()}" for first, last in pairs]


def distinct(
    rng: np.random.Generator, draw: Draw, count: int, taken: Iterable[str] = ()
) -> list[str]:
    """Draw ``count`` different things that are not in ``taken``."""
    seen, found = set(taken), []
    while len(found) < count:
        for thing in draw(rng, count - len(found)):
            if thing not in seen:
                seen.add(thing)
                found.append(thing)
    return found


def numbers(rng: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Draw numbers of that many digits."""
    return list(map(str, rng.integers(10 ** (digits - 1), 10**digits, count).tolist()))


def uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Draw version 4 UUIDs."""
    drawn = rng.bytes(16 * count)
    return [str(UUID(bytes=drawn[16 * i : 16 * i + 16], version=4)) for i in range(count)]


def letters(
    rng: np.random.Generator, count: int, length: int, alphabet: str = string.ascii_uppercase
) -> list[str]:
    """Draw strings of letters."""
    drawn = rng.integers(0, len(alphabet), (count, length)).tolist()
    return ["".join(alphabet[i] for i in row) for row in drawn]


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
    """Return the words of RULER's definition.

    Raises:
        ValueError: the package wonderwords is not installed.
    """
    try:
        # an optional package, required only for RULER's words
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


def with_single(words: Words, path: str) -> Words:
    """Return word lists with other words to count: one a line, or the values of a JSON object.

    Raises:
        ValueError: no such file, or no words in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"words: no file {path}")
    text = read_text(file)
    if file.suffix == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        listed = list(found.values()) if isinstance(found, dict) else found
    else:
        listed = text.split("\n")
    if not isinstance(listed, list):
        raise ValueError(f"{path}: expected words in a list or an object")
    single = tuple(dict.fromkeys(str(word).strip() for word in listed if str(word).strip()))
    if len(single) < 100:
        raise ValueError(f"{path}: {len(single)} different words, at least 100 are needed")
    return replace(words, single=single, source=f"{len(single)} words of {file.name}")


@dataclass(frozen=True, eq=False)
class Filler:
    """Words of a long text, in order, compared and hashed by identity.

    Attributes:
        words: the text, split at white space.
        source: source of the text.
        official: whether the text is the essays of RULER's definition.
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
        """Return this text, repeated to at least this number of words."""
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
        ESSAYS_HUB,
        split="train",
        what="RULER's haystack of Paul Graham's essays",
        way_out="run the task under its own name, long_..., with text that is at hand",
    )
    words = " ".join(str(row["text"]) for row in rows).split()
    return Filler(tuple(words), "Paul Graham essays", official=True)
