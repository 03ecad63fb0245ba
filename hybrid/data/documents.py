"""Tokenised documents: one flat array of token ids and the place where each document starts.

Legend: N documents, n tokens in all.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.files import read_json, write_array
from hybrid.tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index.json"
FORMAT = "hybrid-tokens-1"
BATCH = 256  # documents per call of the tokenizer
BLOCK = 1 << 22  # elements hashed at a time
SHARD = re.compile(r"\d+")  # names of shards: part of the names of their files


@dataclass(frozen=True)
class Documents:
    """N concatenated documents.

    Attributes:
        tokens: (n,) unsigned integers; may be memory-mapped.
        offsets: (N + 1,) int64, document d is ``tokens[offsets[d]:offsets[d + 1]]``.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Return (N,) int64, the tokens of each document."""
        return np.diff(self.offsets)

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray]) -> Documents:
        """Build documents from one array of ids each; empty ones are skipped."""
        arrays = [a for a in arrays if len(a)]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
        return cls(tokens, offsets)

    def problem(self) -> str | None:
        """Return what is wrong with arrays read from disk, or None."""
        for name, array, kind in (("tokens", self.tokens, "u"), ("offsets", self.offsets, "i")):
            if array.ndim != 1 or array.dtype.kind != kind:
                return f"{name}: expected a 1-d array of integers, got {array.ndim}-d {array.dtype}"
        if not len(self.offsets) or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            return f"offsets: expected 0 to {len(self.tokens)}, the number of tokens, got others"
        return "offsets: expected ascending values" if (self.lengths < 0).any() else None

    def checksum(self) -> int:
        """Return the CRC-32 of the tokens and of the document offsets."""
        value = 0
        for array in (self.tokens, self.offsets):
            for start in range(0, len(array), BLOCK):
                value = zlib.crc32(np.ascontiguousarray(array[start : start + BLOCK]).data, value)
        return value


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Yield the token ids of each text, followed by the end-of-text token if the tokenizer has one."""
    dtype = token_dtype(len(tokenizer))
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if is_byte_tokenizer(tokenizer):
        for text in texts:
            # Same ids as those of the tokenizer, two orders of magnitude faster.
            ids = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
            yield np.concatenate([ids, tail]).astype(dtype)
        return
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            yield np.asarray([*ids, *tail], dtype)


def token_dtype(vocabulary: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned integer dtype for all ids of a vocabulary of this size."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the CRC-32 of a vocabulary: its tokens and their ids."""
    words = sorted(tokenizer.get_vocab().items())
    return zlib.crc32(json.dumps(words).encode("utf-8"))


def write_shard(folder: Path, number: int, arrays: Sequence[np.ndarray]) -> dict[str, int | str]:
    """Write one shard as two .npy files; return its entry in the index."""
    documents = Documents.from_arrays(arrays)
    name = f"{number:05d}"
    write_array(folder / f"tokens-{name}.npy", documents.tokens)
    write_array(folder / f"offsets-{name}.npy", documents.offsets)
    return {
        "name": name,
        "tokens": len(documents.tokens),
        "documents": len(documents),
        "checksum": documents.checksum(),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a folder of ``hybrid data prepare``.

    Raises:
        ValueError: the folder has no index, or one of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected a folder of prepared data with {INDEX}, got none; run `hybrid data"
            " prepare` again"
        )
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; prepare the data again") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got another; prepare the data again")
    if problem := _index_problem(index):
        raise ValueError(f"{path}: {problem}; prepare the data again")
    return index


def _index_problem(index: Mapping[str, Any]) -> str | None:
    """Return what is wrong with an index of our format, or None."""
    for key, kind in (("vocabulary", int), ("tokenizer", str), ("shards", list)):
        if not isinstance(index.get(key), kind):
            return f"{key}: expected {kind.__name__}, got {index.get(key)!r}"
    for number, entry in enumerate(index["shards"]):
        if not isinstance(entry, dict) or not SHARD.fullmatch(str(entry.get("name"))):
            return f"shards[{number}]: expected an entry with the name of a shard, got {entry!r}"
        for key in ("tokens", "documents"):
            if type(entry.get(key)) is not int or entry[key] < 0:
                return f"shards[{number}].{key}: expected a count, got {entry.get(key)!r}"
    return None


def open_shards(folder: Path) -> list[Documents]:
    """Open the shards of a prepared folder, memory-mapped.

    Raises:
        ValueError: the folder is not prepared data, or a shard is missing, truncated or damaged.
    """
    return [_open_shard(folder, entry) for entry in read_index(folder)["shards"]]


def _open_shard(folder: Path, entry: Mapping[str, Any]) -> Documents:
    shard = f"{folder}: shard {entry['name']}"
    files = [folder / f"{kind}-{entry['name']}.npy" for kind in ("tokens", "offsets")]
    try:
        tokens, offsets = (np.load(file, mmap_mode="r") for file in files)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{shard}: expected readable files, got {error}; prepare the data again"
        ) from error
    documents = Documents(tokens, offsets)
    problem = documents.problem()
    found = None if problem else (len(tokens), len(documents))
    if found is not None and found != (entry["tokens"], entry["documents"]):
        problem = (
            f"expected {(entry['tokens'], entry['documents'])} tokens and documents, as in the"
            f" index, got {found}"
        )
    if problem:
        raise ValueError(f"{shard}: {problem}; prepare the data again")
    return documents
