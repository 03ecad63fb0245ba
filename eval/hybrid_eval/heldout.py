"""Held-out loss and bits per byte on real text, for any tokenizer.

Each document is split into windows of ``length`` input tokens that overlap by one token, so that
every token except the first of a document is scored exactly once, with at most ``length - 1``
tokens of context. Bits per byte divides by the UTF-8 bytes of the scored text, so models with
different tokenizers can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .corpus import Corpus, Document, load_corpus
from .scoring import IGNORE, Progress, score
from .stats import ratio_and_error, t_interval
from .tokens import ByteEncoder, Encoder


@dataclass(frozen=True)
class Window:
    """Tokens of one document: the first is context only, the others are scored."""

    ids: np.ndarray
    byte_count: float
    document: str


def _byte_ends(document: Document, tokenizer: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and, per token, the number of bytes of text up to its end."""
    text = document.text
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        # bytes of the first i characters
        width = np.fromiter((len(c.encode("utf-8")) for c in text), dtype=np.int64, count=len(text))
        up_to = np.concatenate([[0], np.cumsum(width)])
        # running maximum: the pieces of one split character share its end
        return ids, np.maximum.accumulate(up_to[ends]) if len(ids) else ends
    ids = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64
    )
    # without offsets, spread the bytes evenly; exact for byte tokenizers and whole documents
    total = len(text.encode("utf-8"))
    return ids, total * np.arange(1, len(ids) + 1) / max(len(ids), 1)


def windows(corpus: Corpus, tokenizer: Encoder, length: int) -> list[Window]:
    """Split every document into full windows of ``length`` tokens; drop a shorter remainder.

    Raises:
        ValueError: ``length`` below 2, or no document fills one window.
    """
    if length < 2:
        raise ValueError(f"a window needs a token of context and one to score, got length {length}")
    found = []
    for document in corpus.documents:
        ids, ends = _byte_ends(document, tokenizer)
        for start in range(0, len(ids) - length + 1, length - 1):
            last = start + length - 1
            found.append(
                Window(ids[start : last + 1], float(ends[last] - ends[start]), document.name)
            )
    if not found:
        raise ValueError(f"no document of {corpus.description} fills a window of {length} tokens")
    return found


def _spread(items: Sequence[Window], count: int | None) -> list[Window]:
    """Return ``count`` windows spread evenly over all documents."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _buckets(length: int, scored, count: int) -> list[dict[str, Any]]:
    """Return loss by position in the window, in ``count`` buckets of about equal width."""
    edges = np.linspace(1, length, count + 1).round().astype(int)
    found = []
    for first, last in pairwise(edges):
        sums = [float(row.nll[first - 1 : last - 1].sum()) for row in scored]
        loss, error = ratio_and_error(sums, [float(last - first)] * len(sums))
        found.append({"first": int(first), "last": int(last) - 1, "loss": loss, "stderr": error})
    return found


def evaluate_heldout(
    model,
    *,
    length: int = 256,
    n: int | None = 128,
    corpus: Corpus | None = None,
    tokenizer: Encoder | None = None,
    buckets: int = 4,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure the loss on held-out text.

    Args:
        model: a causal language model.
        length: tokens per window.
        n: number of windows, spread evenly over the documents; None takes all.
        corpus: None takes the held-out split of the standard library's sources.
        tokenizer: None reads bytes.
        buckets: number of position buckets; 0 for none.
        batch_size: rows per forward; None chooses.
        progress: called with the number of windows done and of windows in all.
        allow_longer: permit windows beyond ``max_position_embeddings``.

    Returns:
        loss (nats per token) and bits_per_byte with standard errors over windows, perplexity,
        the tokens and bytes scored, and loss by position.
    """
    corpus = load_corpus(None) if corpus is None else corpus
    chosen = _spread(windows(corpus, tokenizer or ByteEncoder(), length), n)
    rows = []
    for window in chosen:
        labels = window.ids.copy()
        labels[0] = IGNORE
        rows.append({"input_ids": window.ids, "labels": labels})
    scored = score(model, rows, batch_size=batch_size, progress=progress, allow_longer=allow_longer)
    nll = [float(row.nll.sum()) for row in scored]
    byte_counts = [window.byte_count for window in chosen]
    loss, loss_error = ratio_and_error(nll, [length - 1.0] * len(nll))
    nats_per_byte, byte_error = ratio_and_error(nll, byte_counts)
    bits, bits_error = nats_per_byte / math.log(2), byte_error / math.log(2)
    return {
        "loss": loss,
        "loss_stderr": loss_error,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_error,
        "interval": t_interval(bits, bits_error, len(chosen)),
        "tokens_scored": (length - 1) * len(chosen),
        "bytes_scored": sum(byte_counts),
        "n": len(chosen),
        "positions": _buckets(length, scored, buckets) if buckets else [],
        "tokens": {"min": length, "max": length},
        "truncated": 0,
        "haystack": corpus.description,
        "items": [a / (b * math.log(2)) for a, b in zip(nll, byte_counts, strict=True)],
    }
