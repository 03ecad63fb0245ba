"""Open the sources of a config's ``data:`` as rows.

    stdlib                     text of Python's own sources (hybrid/data/stdlib.py)
    a folder of prepared data  token shards that ``hybrid data prepare`` wrote, memory-mapped
    a path or pattern          .txt, .jsonl, .parquet, ... through ``datasets``
    a plug-in's name           any package's entry point in the group ``hybrid.data``
    any other name             a data set of the hub

A plug-in is a callable ``f(*, sequence_length, seed, tokenizer, **options)`` that returns endless
rows ``{"input_ids", "labels"}``, each of at most ``sequence_length`` tokens, with labels as in
transformers (shifted inside the model, -100 for no loss). The returned object supports
``source[i]``, or is only iterable. In the second case a resumed run reads and discards the earlier
rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from hybrid.config.declare import Declared, Positive, Text, refuse, show
from hybrid.config.options import did_you_mean
from hybrid.data.documents import (
    INDEX,
    Documents,
    encode,
    fingerprint,
    open_shards,
    read_index,
)
from hybrid.data.packing import LongDocuments, Packing, Row, pack
from hybrid.data.rows import PluginRows, Rows, ShuffledRows, StreamedRows, complete, packed_stream
from hybrid.data.stdlib import Split, stdlib_texts
from hybrid.data.texts import is_path, load_texts, origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = "hybrid.data"
STDLIB = "stdlib"
GIVEN = ("sequence_length", "seed", "tokenizer")  # arguments of every plug-in


class Source(Declared):
    """One source of rows; a plug-in has its own options instead of those for text."""

    source: Text = Field(
        description="stdlib, a path or pattern, a plug-in's name, or a hub data set"
    )
    text_key: Text = Field("text", description="column that holds the text")
    split: Text = Field(
        "train", description="split of a hub data set; of stdlib, 'train' or 'heldout'"
    )
    name: Text | None = Field(None, description="configuration of a hub data set")
    streaming: bool = Field(False, description="read and tokenise during training")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of a plug-in; they can also be keys of the entry itself",
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        """Accept a name for a source without options; move the options of a plug-in to ``options``."""
        if isinstance(values, str):
            values = {"source": values}
        source = values.get("source") if isinstance(values, Mapping) else None
        if not isinstance(source, str):
            return values
        if source not in plugins():
            if problem := _misspelt(source):
                refuse([f": {problem}"])  # do not check its options, which may be correct
            return values
        own = cls._own_keys()
        options = {str(k): v for k, v in values.items() if k not in own}
        inner = options.pop("options", {})
        if not isinstance(inner, Mapping):
            refuse([f"options: expected mapping, got {show(inner)}"])
        return {k: v for k, v in values.items() if k in own} | {"options": {**options, **inner}}

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str, info: ValidationInfo) -> str:
        source = info.data.get("source")
        if source == STDLIB and split not in get_args(Split):
            near = did_you_mean(split, get_args(Split))
            refuse([f": expected a split of stdlib, got {split!r}, {near}"])
        return cls._of_no_file(split, info)

    @field_validator("name")
    @classmethod
    def _of_no_file(cls, value: str | None, info: ValidationInfo) -> Any:
        source, default = info.data.get("source"), cls.model_fields[str(info.field_name)].default
        # Files have no splits: accepting one would return all texts, held-out ones included.
        if source is not None and source != STDLIB and is_path(source) and value != default:
            refuse([f": expected none for files, got {value!r}; try naming the files in `source`"])
        return value

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        source = info.data.get("source")
        entry = plugins().get(source) if source is not None else None
        if entry is not None:
            refuse(_unknown_options(entry, options, cls._own_keys()))
        elif source is not None:
            refuse([f": expected none, since {source!r} is not a plug-in, got {show(options)}"])
        return options

    @classmethod
    def _own_keys(cls) -> set[str]:
        """Return the keys that are not options of a plug-in."""
        return (cls.model_fields.keys() - Source.model_fields.keys()) | {"source"}

    def as_dict(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, with a plug-in's options beside
        ``source``.
        """
        values = self.model_dump(exclude_defaults=True)
        return values | values.pop("options", {})


class SourceConfig(Source):
    """One weighted source of a run."""

    weight: Positive = Field(
        1.0, description="share of the training rows, relative to the other sources"
    )


@dataclass(frozen=True)
class RowFormat:
    """The format of rows, common to all sources of a run."""

    length: int
    pad_id: int
    packing: Packing = "concatenate"
    long_documents: LongDocuments = "split"


def plugins() -> dict[str, EntryPoint]:
    """Return the installed plug-ins by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def source_names() -> list[str]:
    """Return the names of the built-in source and of the installed plug-ins."""
    return sorted({STDLIB, *plugins()})


def _misspelt(source: str) -> str | None:
    """Return an error for a name that is not a path and is similar to a known name."""
    if is_path(source) or "/" in source or source in (known := source_names()):
        return None
    near = did_you_mean(source, known)
    return f"unknown source {source!r}, {near}" if near.startswith("did you mean") else None


def _unknown_options(entry: EntryPoint, options: Mapping[str, Any], beside: set[str]) -> list[str]:
    try:
        parameters = inspect.signature(entry.load()).parameters.values()
    except Exception as error:  # any error of a user's module
        return [f": plug-in {entry.name!r} cannot be imported: {type(error).__name__}: {error}"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    known = {p.name for p in parameters if p.name not in (*GIVEN, "start")} | beside
    return [
        f"{key}: unknown option of {entry.name!r}, {did_you_mean(key, known)}"
        for key in options
        if key not in known
    ]


def open_source(
    config: Source, tokenizer: PreTrainedTokenizerBase, rows: RowFormat, seed: int
) -> Rows:
    """Open one source.

    Args:
        config: the entry of ``data:``.
        tokenizer: converts text to ids.
        rows: length and packing of a row.
        seed: seed of the order of rows, or of a plug-in's random numbers.

    Raises:
        ValueError: files are missing, a column is missing, the source is empty, ...
    """
    if entry := plugins().get(config.source):
        return _open_plugin(entry, config, tokenizer, rows, seed)
    if config.source == STDLIB:
        texts = stdlib_texts("heldout" if config.split == "heldout" else "train")
        parts = [Documents.from_arrays(list(encode(texts, tokenizer)))]
    elif (Path(config.source) / INDEX).is_file():
        parts = _open_prepared(Path(config.source), tokenizer)
    else:
        start = open_texts(config)
        if config.streaming:
            return StreamedRows(
                lambda: _stream(start, tokenizer, rows, config.source),
                lambda: origin(config.source),
            )
        parts = [Documents.from_arrays(list(encode(start(0), tokenizer)))]
    if not any((p.lengths > 1).any() for p in parts):
        raise ValueError(f"{config.source}: expected a document of at least two tokens, got none")
    packed = [pack(p, rows.length, rows.pad_id, rows.packing, rows.long_documents) for p in parts]
    return ShuffledRows(packed, seed)


def open_texts(config: Source) -> Callable[[int], Iterator[str]]:
    """Return a function from the epoch to an iterator over the texts of a source.

    Raises:
        ValueError: the source does not exist, or has no text.
    """
    if config.source == STDLIB:
        split: Split = "heldout" if config.split == "heldout" else "train"
        return lambda epoch: iter(stdlib_texts(split))
    if problem := _misspelt(config.source):
        raise ValueError(problem)
    return load_texts(
        config.source,
        text_key=config.text_key,
        split=config.split,
        name=config.name,
        streaming=config.streaming,
    )


def _stream(
    start: Callable[[int], Iterator[str]],
    tokenizer: PreTrainedTokenizerBase,
    rows: RowFormat,
    source: str,
) -> Iterator[Row]:
    def documents() -> Iterator[np.ndarray]:
        for epoch in count():
            longest = 0
            for ids in encode(start(epoch), tokenizer):
                longest = max(longest, len(ids))
                yield ids
            if longest < 2:
                raise ValueError(f"{source}: expected a document of at least two tokens, got none")

    return packed_stream(documents(), rows.length, rows.pad_id, rows.packing, rows.long_documents)


def _open_prepared(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[Documents]:
    index = read_index(folder)
    if index["vocabulary"] != len(tokenizer):
        raise ValueError(
            f"{folder}: expected data prepared with this run's tokenizer of {len(tokenizer)} tokens,"
            f" got one of {index['vocabulary']}; prepare it again with this run's tokenizer"
        )
    # data prepared by earlier versions has no fingerprint
    if index.get("fingerprint", found := fingerprint(tokenizer)) != found:
        raise ValueError(
            f"{folder}: expected data prepared with this run's tokenizer, got"
            f" {index['tokenizer']!r} with other ids; prepare it again with this run's tokenizer"
        )
    return open_shards(folder)


def _open_plugin(
    entry: EntryPoint,
    config: Source,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowFormat,
    seed: int,
) -> Rows:
    function = entry.load()

    def start() -> Any:
        return function(
            sequence_length=rows.length, seed=seed, tokenizer=tokenizer, **config.options
        )

    from torch.utils.data import IterableDataset

    made = start()
    # torch's iterable data sets, and with them those of ``datasets``, have a ``__getitem__`` that raises
    if hasattr(made, "__getitem__") and not isinstance(made, IterableDataset):
        return PluginRows(made, rows.length, rows.pad_id)
    return StreamedRows(lambda: (complete(r, rows.length, rows.pad_id) for r in start()))
