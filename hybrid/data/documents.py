"""Tokenised documents: one flat array of token ids and the place where each document starts.

Legend: N documents, n tokens in all.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid.tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index.json"
FORMAT = "hybrid-tokens-1"
BATCH = 256  # documents handed to the tokenizer at a time


@dataclass(frozen=True)
class Documents:
    """N documents back to back.

    Attributes:
        tokens: (n,) unsigned integers; may be memory-mapped.
        offsets: (N + 1,) int64, document d is `tokens[offsets[d]:offsets[d + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each document."""
        return np.diff(self.offsets)

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray]) -> Documents:
        """Documents from one array of ids each; empty ones are left out."""
        arrays = [a for a in arrays if len(a)]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
        return cls(tokens, offsets)


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of each text, followed by the end-of-text token where the tokenizer has one."""
    dtype = token_dtype(len(tokenizer))
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if is_byte_tokenizer(tokenizer):
        for text in texts:
            # The same ids as the tokenizer's own, two orders of magnitude sooner.
            ids = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
            yield np.concatenate([ids, tail]).astype(dtype)
        return
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            yield np.asarray([*ids, *tail], dtype)


def token_dtype(vocabulary: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer that holds every id of a vocabulary of this size."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> int:
    """CRC-32 of a vocabulary: which token has which id."""
    words = sorted(tokenizer.get_vocab().items())
    return zlib.crc32(json.dumps(words).encode("utf-8"))


def write_shard(folder: Path, number: int, arrays: Sequence[np.ndarray]) -> dict[str, int | str]:
    """One shard as two .npy files; returns its entry in the index."""
    documents = Documents.from_arrays(arrays)
    name = f"{number:05d}"
    np.save(folder / f"tokens-{name}.npy", documents.tokens)
    np.save(folder / f"offsets-{name}.npy", documents.offsets)
    return {"name": name, "tokens": len(documents.tokens), "documents": len(documents)}


def read_index(folder: Path) -> dict:
    """The index of a folder that `hybrid data prepare` wrote.

    Raises:
        ValueError: the folder holds none, or one of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {INDEX}: not a folder of prepared data, or preparation did not"
            " finish"
            " (run `hybrid data prepare` again)"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the data again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT!r} that this version reads")
    return index


def open_shards(folder: Path) -> list[Documents]:
    """The shards of a prepared folder, memory-mapped.

    Raises:
        ValueError: the folder is not one, or a shard is missing or cut short.
    """
    shards = []
    for entry in read_index(folder)["shards"]:
        files = [folder / f"{kind}-{entry['name']}.npy" for kind in ("tokens", "offsets")]
        try:
            tokens, offsets = (np.load(file, mmap_mode="r") for file in files)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: shard {entry['name']} cannot be read ({error})") from error
        found = (len(tokens), len(offsets) - 1)
        if found != (entry["tokens"], entry["documents"]):
            raise ValueError(
                f"{folder}: shard {entry['name']} holds {found} tokens and documents, its index"
                " says"
                f" {(entry['tokens'], entry['documents'])}"
            )
        shards.append(Documents(tokens, offsets))
    return shards
