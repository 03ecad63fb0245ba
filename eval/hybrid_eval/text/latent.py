"""Needles that share no word with their question, after NoLiMa (arXiv 2502.05167).

    ... Yara lives next to the Charles Bridge. ...      Which character has been to Prague?

To find the needle a model has to know what it is about: matching words is of no use. Other
characters live next to other places, so that naming some character is not enough. Places and names
are our own.
"""

from ..seeding import generator
from .counter import Counter
from .fill import cumulate, fill
from .grid import haystack_words
from .material import Filler, Words
from .sample import TextSample

_ROOM = 8
_OTHERS = 3  # characters who live elsewhere
# landmark: city, country
LANDMARKS: dict[str, tuple[str, str]] = {
    "Eiffel Tower": ("Paris", "France"),
    "Colosseum": ("Rome", "Italy"),
    "Brandenburg Gate": ("Berlin", "Germany"),
    "Sagrada Familia": ("Barcelona", "Spain"),
    "Acropolis": ("Athens", "Greece"),
    "Hagia Sophia": ("Istanbul", "Turkey"),
    "Taj Mahal": ("Agra", "India"),
    "Forbidden City": ("Beijing", "China"),
    "Statue of Liberty": ("New York", "the United States"),
    "Hermitage Museum": ("Saint Petersburg", "Russia"),
    "Charles Bridge": ("Prague", "the Czech Republic"),
    "Tower Bridge": ("London", "England"),
    "Little Mermaid": ("Copenhagen", "Denmark"),
    "Atomium": ("Brussels", "Belgium"),
    "Wawel Castle": ("Krakow", "Poland"),
    "Schoenbrunn Palace": ("Vienna", "Austria"),
    "Petronas Towers": ("Kuala Lumpur", "Malaysia"),
    "Christ the Redeemer": ("Rio de Janeiro", "Brazil"),
    "Rijksmuseum": ("Amsterdam", "the Netherlands"),
    "Fushimi Inari Shrine": ("Kyoto", "Japan"),
    "Fisherman's Bastion": ("Budapest", "Hungary"),
    "Great Sphinx": ("Giza", "Egypt"),
    "Table Mountain": ("Cape Town", "South Africa"),
    "Belem Tower": ("Lisbon", "Portugal"),
}
NAMES = (
    *("Yara", "Tobias", "Mina", "Caleb", "Ingrid", "Rafael", "Noor", "Stefan", "Lucia", "Omar"),
    *("Petra", "Hugo", "Anika", "Dario", "Selma", "Viktor", "Leila", "Bruno", "Maren", "Emil"),
)


def latent_niah(
    *,
    length: int,
    depth: float,
    index: int,
    seed: int,
    counter: Counter,
    filler: Filler,
    words: Words,
    hops: int = 1,
) -> TextSample:
    """Hide a sentence with a landmark at exactly ``depth`` of a text, and ask for its city or
    country.

    Args:
        length: tokens of prompt, prefix and generation.
        depth: of the needle, in [0, 1].
        index: of the sample.
        seed: of the run.
        counter: of tokens.
        filler: the text.
        words: ignored.
        hops: 1 asks by the city of the landmark, 2 by the country.

    Raises:
        ValueError: depth outside [0, 1], hops other than 1 or 2, or a length that holds no needle.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    if hops not in (1, 2):
        raise ValueError(f"latent_niah: hops must be 1 (city) or 2 (country), got {hops}")
    rng = generator("latent_niah", seed, length, depth, index)
    names = [NAMES[i] for i in rng.choice(len(NAMES), _OTHERS + 1, replace=False)]
    marks = [list(LANDMARKS)[i] for i in rng.choice(len(LANDMARKS), _OTHERS + 1, replace=False)]
    needle, *others = (
        f"{who} lives next to the {mark}." for who, mark in zip(names, marks, strict=True)
    )
    spots = sorted(rng.random(_OTHERS).tolist())
    place = LANDMARKS[marks[0]][hops - 1]
    hay = haystack_words(filler, int(rng.integers(len(filler.words))), length)
    head = "Read the following text. I will ask you about one of its characters afterwards.\n"
    question = f"\nWhich character has been to {place}?"
    prefix = f"The character who has been to {place} is"

    def build(units: int) -> tuple[str, int]:
        pieces = list(hay[:units])
        for other, spot in reversed(list(zip(others, spots, strict=True))):
            pieces.insert(int(spot * len(pieces)), other)
        at = round(depth * len(pieces))
        before = head + "".join(f"{piece} " for piece in pieces[:at])
        after = "".join(f" {piece}" for piece in pieces[at:])
        return before + needle + after + question, len(before)

    filled = fill(
        lambda units: counter.text(f"{build(units)[0]} {prefix}"),
        cumulate(counter.words(hay)),
        length - _ROOM,
        minimum=0,
        what=f"latent_niah at length {length}",
    )
    prompt, start = build(filled.units)
    return TextSample(
        task="latent_niah",
        index=index,
        length=length,
        prompt=prompt,
        answer_prefix=prefix,
        outputs=(names[0],),
        match="all",
        max_new_tokens=_ROOM,
        prompt_tokens=filled.tokens,
        slack=length - _ROOM - filled.tokens,
        filler_tokens=filled.next_tokens,
        haystack=filler.source,
        depth=depth,
        needle_positions=counter.positions(f"{prompt} {prefix}", [start]),
        details={"landmark": marks[0], "place": place, "others": names[1:]},
    )
