"""True token counts of prompts, with cached counts of pieces.

Most of a sample is filler that is common to all samples. A tokenizer that never merges
across a space tokenises each of these pieces equally everywhere, so the count of a prompt is the
sum of the counts of its pieces. This is verified: the vocabulary must have no token across
such a boundary, and the 1st, 2nd, 4th, 8th, ... prompt is also counted as a whole.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..tokens import Encoder, ends_with_special

# A prompt can be split before a single space between two visible ASCII characters. At other
# white space, tokenizers depend on more than one character.
_EDGE = re.compile(r"(?<=[!-~]) (?=[!-~])")
_VISIBLE = re.compile(r"[!-~]")
_PIECE = re.compile(r"[!-~](?:.*[!-~])?", re.DOTALL)
# spaces in vocabularies: literal, U+0120 in byte-level ones, U+2581 in others
_SPACES = (" ", "\u0120", "\u2581")
_ACROSS = re.compile(f"[!-~][{''.join(_SPACES)}]")
# Pieces are counted after a word, since some tokenizers treat the start of a text differently.
_ANCHOR = "a"
# Random numbers and keys occur only once, so the cache is cleared from time to time.
_MOST_PIECES = 1 << 18


def _at_every_space(text: str) -> list[str]:
    return text.split(" ")


def parts_at_spaces(tokenizer: Any) -> bool:
    """Return whether no token of a fast tokenizer's vocabulary crosses a space between words."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    added = tokenizer.get_added_vocab()
    return not any(_ACROSS.search(token) for token in tokenizer.get_vocab() if token not in added)


def _begin_with_space(tokenizer: Any) -> np.ndarray:
    """Return for every id whether its token begins with a space."""
    vocabulary = tokenizer.get_vocab()
    found = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    found[[number for token, number in vocabulary.items() if token.startswith(_SPACES)]] = True
    return found


class Counter:
    """Counter of tokens.

    Args:
        tokenizer: the tokenizer.
        by_pieces: cache the counts of pieces, if the tokenizer allows it. False tokenises
            every prompt as a whole, which is faster for prompts without common pieces.

    Attributes:
        by_pieces: whether prompts are counted as the sum of their pieces.
        disagreed: whether such a sum was wrong. From then on prompts are tokenised as a
            whole, and earlier counts must be repeated.
    """

    def __init__(self, tokenizer: Encoder, *, by_pieces: bool = True):
        self.tokenizer: Any = tokenizer
        self.by_pieces = by_pieces and parts_at_spaces(tokenizer)
        self.disagreed = False
        self._heads: dict[str, int] = {}
        self._pieces: dict[str, int] = {}
        self._estimates: dict[str, int] = {}
        self._prefixes: dict[int, tuple[Sequence[str], list[int]]] = {}
        self._recent: dict[str, Any] = {}
        self._last: tuple[str, list[str]] = "", []
        self._texts = 0
        self._added: re.Pattern[str] | None = None
        if self.by_pieces:
            self._anchor = self.count(_ANCHOR)
            self._spaced = _begin_with_space(tokenizer)
            added = "|".join(map(re.escape, self.tokenizer.get_added_vocab()))
            self._added = re.compile(added) if added else None

    def text(self, text: str) -> int:
        """Return the tokens of a whole prompt, without a special token at its end."""
        pieces = self._split(text)
        if pieces is None:
            return self._whole(text)
        found = self._sum(pieces)
        self._texts += 1
        if self._texts & (self._texts - 1) == 0 and found != (whole := self._whole(text)):
            self.by_pieces, self.disagreed = False, True
            return whole
        return found

    def positions(self, text: str, places: Sequence[int]) -> tuple[int, ...]:
        """Return the index of the token that contains each of these characters of a prompt."""
        pieces = self._split(text)
        if pieces is None:
            return self._whole_positions(text, places)
        # the piece of number n ends n spaces and ends[n] other characters into the prompt
        ends = list(accumulate(map(len, pieces)))
        found = []
        for place in places:
            number = bisect_right(range(len(ends)), place, key=lambda n: ends[n] + n)
            begin = ends[number] + number - len(pieces[number])
            found.append(self._position(pieces[: number + 1], place - begin))
        return tuple(found)

    def count(self, piece: str) -> int:
        """Return the tokens of a separate text, without special tokens."""
        if getattr(self.tokenizer, "is_fast", False):
            return len(self._encodings([piece])[0])
        return len(self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    def piece(self, piece: str) -> int:
        """Return what :meth:``count`` does, remembered."""
        if piece not in self._estimates:
            self._estimates[piece] = self.count(piece)
        return self._estimates[piece]

    def words(self, words: Sequence[str]) -> list[int]:
        """Return the approximate number of tokens of each word within a text."""
        if self.by_pieces:
            new = [word for word in dict.fromkeys(words) if word not in self._pieces]
            self._learn([word for word in new if _PIECE.fullmatch(word)])
        return [self._pieces.get(word) or self.piece(f" {word}") for word in words]

    def prefix(self, words: Sequence[str], most: int) -> list[int]:
        """Return the approximate tokens of the first 0, 1 ... ``most`` words within a text.

        Cached by the id of the sequence, of which a reference is held so that the id stays valid.
        """
        _, sums = self._prefixes.setdefault(id(words), (words, [0]))
        new = words[len(sums) - 1 : most]
        sums += accumulate((max(1, n) for n in self.words(new)), initial=sums.pop())
        return sums[: most + 1]

    def _split(self, text: str) -> list[str] | None:
        """Split a prompt into pieces, and count the pieces that are not cached.

        The spaces between pieces are removed. Return None if the prompt must be tokenised as a
        whole.
        """
        if not self.by_pieces or not _VISIBLE.fullmatch(text[-1:]):
            return None
        if text == self._last[0]:
            return self._last[1]
        if len(self._pieces) > _MOST_PIECES:
            self._pieces.clear()
        # nearly always every space is an edge; the regular expression costs ten times as much
        for split in (_at_every_space, _EDGE.split):
            pieces = split(text)
            new = [piece for piece in pieces[1:] if piece not in self._pieces]
            if _VISIBLE.fullmatch(pieces[0][-1:]) and all(map(_PIECE.fullmatch, new)):
                break
        if len(pieces) == 1 or self._holds_added(pieces[:1]) or not self._learn(new):
            return None
        self._last = text, pieces
        return pieces

    def _learn(self, new: Sequence[str]) -> bool:
        """Count new pieces; return whether pieces can be counted separately."""
        if self._holds_added(new):
            return False
        self._pieces.update(zip(new, self._measure(new), strict=True))
        return True

    def _holds_added(self, pieces: Sequence[str]) -> bool:
        """Return whether a token that was added to the vocabulary occurs in these pieces.

        Such a token can affect the tokens of the surrounding text.
        """
        return self._added is not None and self._added.search(" ".join(pieces)) is not None

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        """Encode without special tokens and offsets, which is faster."""
        backend = self.tokenizer.backend_tokenizer
        # as the tokenizer sets it for every call without these
        backend.no_truncation()
        backend.no_padding()
        return backend.encode_batch_fast(texts, add_special_tokens=False)

    def _measure(self, pieces: Sequence[str]) -> list[int]:
        """Return the tokens of each piece after a word and a space."""
        if not pieces:
            return []
        ids = self._encodings([" ".join((_ANCHOR, *pieces))])[0].ids
        begins = np.flatnonzero(self._spaced[ids])
        if len(begins) == len(pieces):
            return np.diff(begins, append=len(ids)).tolist()
        # pieces with spaces in them, or a tokenizer whose tokens have none
        encoded = self._encodings([f"{_ANCHOR} {piece}" for piece in pieces])
        return [len(encoding) - self._anchor for encoding in encoded]

    def _sum(self, pieces: Sequence[str]) -> int:
        """Return the tokens of the pieces of a prompt, from its start."""
        head = pieces[0]
        if head not in self._heads:
            self._heads[head] = self._whole(head)
        return self._heads[head] + sum(map(self._pieces.__getitem__, pieces[1:]))

    def _position(self, pieces: Sequence[str], place: int) -> int:
        """Return the index of the token that contains a character of the last of these pieces."""
        if len(pieces) == 1:
            return self._whole_positions(pieces[0], [place])[0]
        text = f"{_ANCHOR} {pieces[-1]}"
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        inside = encoded.char_to_token(len(_ANCHOR) + 1 + place)
        return self._sum(pieces[:-1]) + inside - self._anchor

    def _encode(self, text: str) -> Any:
        """Tokenise a whole text; the last few results are cached."""
        if text not in self._recent:
            if len(self._recent) >= 4:
                self._recent.pop(next(iter(self._recent)))
            self._recent[text] = self.tokenizer(
                text, verbose=False, return_attention_mask=False, return_token_type_ids=False
            )
        return self._recent[text]

    def _whole(self, text: str) -> int:
        ids = self._encode(text)["input_ids"]
        return len(ids) - ends_with_special(self.tokenizer, ids)

    def _whole_positions(self, text: str, places: Sequence[int]) -> tuple[int, ...]:
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self._encode(text)
            found = [encoded.char_to_token(place) for place in places]
            if all(token is not None for token in found):
                return tuple(found)
        return tuple(self._whole(text[:place]) for place in places)
