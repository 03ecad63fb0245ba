"""Tokenization, for models with a tokenizer and for byte-level models."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .corpus import Corpus


class Encoder(Protocol):
    """Interface of a tokenizer; Hugging Face tokenizers implement it."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Return at least "input_ids"."""

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Return the text of these ids."""
        ...


class ByteEncoder:
    """Byte-level tokenizer: a token id is the value of a UTF-8 byte."""

    name_or_path = "bytes"
    vocab_size = 256
    is_fast = False
    eos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        """Return the bytes of the text as "input_ids"."""
        return {"input_ids": list(text.encode("utf-8"))}

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Return the text of these bytes; invalid UTF-8 becomes U+FFFD."""
        return bytes(token_ids).decode("utf-8", errors="replace")


def reads_bytes(tokenizer: Encoder) -> bool:
    """Return whether token ids are UTF-8 bytes, so that encoding is fast."""
    probe = "".join(map(chr, range(1, 0x180))) + "a  b\r\n\u20ac\U0001f600"
    found = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    return list(found) == list(probe.encode("utf-8"))


def encode(tokenizer: Encoder, text: str) -> np.ndarray:
    """Return the ids of a text, without special tokens."""
    if reads_bytes(tokenizer):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
    # verbose=False: a haystack is longer than the model, and it is cut before the model sees it
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def ends_with_special(tokenizer: Encoder, ids: Sequence[int]) -> bool:
    """Return whether the tokenizer appended an end-of-text token."""
    end = getattr(tokenizer, "eos_token_id", None)
    return end is not None and len(ids) > 1 and ids[-1] == end


def prompt_ids(tokenizer: Encoder, text: str) -> list[int]:
    """Return ids with the special tokens at the start, without those at the end."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if ends_with_special(tokenizer, ids) else ids


def continuation_ids(
    tokenizer: Encoder, context: str, continuation: str, *, special: bool = True
) -> tuple[list[int], int]:
    """Tokenise a context and its continuation as one text.

    The tokens of a continuation depend on its context: a normaliser may prepend a character, and a
    merge may cross the boundary. Spaces at the end of the context belong to the continuation, as in
    lm-eval; a token that crosses the boundary belongs to the continuation.

    Args:
        tokenizer: the model's.
        context: text that is not scored.
        continuation: text that is scored.
        special: add special tokens at the start; False if the context has them.

    Returns:
        The ids of the whole text, and the index of the first scored id.

    Raises:
        ValueError: the context is empty.
    """

    def encoded(text: str) -> list[int]:
        if special:
            return prompt_ids(tokenizer, text)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    stripped = context.rstrip()
    whole = encoded(context + continuation)
    before = encoded(stripped)
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before)
    )
    start = min(shared, len(whole) - 1)
    if start < 1:
        raise ValueError(
            f"no token before the answer {continuation[:40]!r} to condition it on; the prompt is "
            f"{context[-40:]!r}"
        )
    return whole, start


class Haystack:
    """A long stream of tokens of text, without ids that are reserved by a task.

    Args:
        corpus: the text.
        tokenizer: its encoder.
        reserved: half-open ranges of ids that must not occur.

    Raises:
        ValueError: no token remains.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Encoder, reserved: Sequence[tuple[int, int]] = ()
    ):
        ids = encode(tokenizer, corpus.text)
        keep = np.ones(len(ids), dtype=bool)
        for first, last in reserved:
            keep &= (ids < first) | (ids >= last)
        self.ids = ids[keep]
        self.description = corpus.description
        if len(self.ids) == 0:
            raise ValueError(
                f"no token of the haystack ({corpus.description}) is outside {reserved}"
            )

    def cut(self, start: int, length: int) -> np.ndarray:
        """Return ``length`` ids from ``start``, wrapping at the end of the text."""
        at = np.arange(start, start + length) % len(self.ids)
        return self.ids[at]
