"""Tokenise text before training into shards of token ids, which training memory-maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid.config.declare import build
from hybrid.config.options import ConfigError
from hybrid.data.documents import FORMAT, INDEX, encode, fingerprint, write_shard
from hybrid.data.sources import Source, open_texts, plugins
from hybrid.files import write_json
from hybrid.locks import sole_writer
from hybrid.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedTokenizerBase

EVERY = 256  # documents between two reports of progress


def prepare(
    source: str,
    output: str | Path,
    *,
    tokenizer: str = "bytes",
    shard_tokens: int = 100_000_000,
    progress: Callable[[int, int], None] | None = None,
    **options: object,
) -> dict:
    """Tokenise a source of text into the folder ``output``, which a config can use as a source.

    The index is written last and atomically: a folder with an index is complete.

    Args:
        source: stdlib, a path or pattern, or a hub data set.
        output: a folder; created if missing.
        tokenizer: ``bytes``, or a Hugging Face tokenizer by name or path.
        shard_tokens: tokens per shard.
        progress: called every ``EVERY`` documents and at the end with the number of documents and
            tokens.
        options: ``text_key``, ``split``, ``name``, ``streaming``, as in a config's ``data:``.

    Returns:
        The index: ``format``, ``tokenizer``, ``vocabulary``, ``fingerprint``, ``documents``,
        ``tokens``, ``shards``.

    Raises:
        ValueError: an option is unknown, the source has no text, or ``output`` already has prepared
            data.
    """
    if source in plugins():
        raise ValueError(
            f"source: expected text, got the plug-in {source!r}, whose rows are drawn during training;"
            " try it under `data:` of a training config"
        )
    mistakes: list[str] = []
    config = build(Source, {"source": source, **options}, "source", mistakes)
    if config is None or mistakes:
        raise ConfigError(mistakes, "the source")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: expected at least 1, got {shard_tokens}")
    folder = Path(output)
    if (folder / INDEX).exists():
        raise ValueError(
            f"{folder}: expected a folder without prepared data, got one with; remove it or try"
            " another"
        )
    texts = open_texts(config)
    loaded = load_tokenizer(tokenizer)
    with sole_writer(folder):
        return _prepare(folder, texts(0), tokenizer, loaded, shard_tokens, progress)


def _prepare(
    folder: Path,
    texts: Iterable[str],
    tokenizer: str,
    loaded: PreTrainedTokenizerBase,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> dict:
    shards: list[dict] = []
    batch: list[np.ndarray] = []
    held = documents = tokens = 0
    for ids in encode(texts, loaded):
        batch.append(ids)
        held, documents, tokens = held + len(ids), documents + 1, tokens + len(ids)
        if held >= shard_tokens:
            shards.append(write_shard(folder, len(shards), batch))
            batch, held = [], 0
        if progress is not None and documents % EVERY == 0:
            progress(documents, tokens)
    if batch:
        shards.append(write_shard(folder, len(shards), batch))
    if progress is not None:
        progress(documents, tokens)
    index = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "vocabulary": len(loaded),
        "fingerprint": fingerprint(loaded),
        "documents": _total(shards, "documents"),
        "tokens": _total(shards, "tokens"),
        "shards": shards,
    }
    write_json(folder / INDEX, index)
    return index


def _total(shards: list[dict], key: str) -> int:
    return sum(shard[key] for shard in shards)
