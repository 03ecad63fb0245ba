"""``hybrid tokenizer``: tokenizers on texts in several languages, and what their vocabularies cost.

Fertility is the number of tokens per word, and continued words are those of two tokens or more (Rust et
al., arXiv 2012.15613, section 4.2). The premium of a language is its number of tokens divided by that of
the first language, for the same text in both (Petrov et al., arXiv 2305.15425). Words are what white
space separates; languages without it have no fertility.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hybrid.config.options import ConfigError
from hybrid.files import read_json, write_json, write_text
from hybrid.tokenizer import load_tokenizer

NO_SPACES = ("zh", "ja", "th", "lo", "km", "my")
"""Languages whose words are not separated by white space."""

FORMATS = (".md", ".csv", ".json")


@dataclass(frozen=True)
class Fertility:
    """Counts of one tokenizer on one text.

    Attributes:
        tokenizer, language: which.
        vocabulary: number of tokens that the tokenizer has.
        tokens: of the text, without special tokens.
        bytes_per_token: UTF-8 bytes per token.
        fertility: tokens per word; None without words.
        continued: share of the words with two tokens or more, 0..1; None without words.
        premium: tokens divided by those of the first language.
    """

    tokenizer: str
    language: str
    vocabulary: int
    tokens: int
    bytes_per_token: float
    fertility: float | None
    continued: float | None
    premium: float


@dataclass(frozen=True)
class VocabularyCost:
    """What a vocabulary costs in a model.

    Attributes:
        tokenizer: which.
        vocabulary: number of tokens.
        parameters: of the embedding and an untied head.
        share: of all parameters of the model with this vocabulary, 0..1.
        head_flops: forward FLOPs of the head per token.
        logit_bytes: of the float32 logits of one token.
    """

    tokenizer: str
    vocabulary: int
    parameters: int
    share: float
    head_flops: int
    logit_bytes: int


def default_texts() -> dict[str, str]:
    """Return language -> article 1 of the Universal Declaration of Human Rights."""
    return read_json(Path(__file__).with_name("tokenizer_texts.json"))


def read_texts(words: Sequence[str]) -> dict[str, str]:
    """Return language -> text of ``LANGUAGE=FILE`` arguments, or the default texts for none.

    Raises:
        ConfigError: another form, a language given twice, or a file that is not text.
    """
    texts: dict[str, str] = {}
    mistakes = []
    for word in words:
        language, equals, path = word.partition("=")
        if not (language and equals and path):
            mistakes.append(f"--text: expected LANGUAGE=FILE, got {word!r}; try en=book.txt")
        elif language in texts:
            mistakes.append(f"--text: expected each language once, got {language!r} twice")
        else:
            try:
                texts[language] = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                mistakes.append(f"--text: expected a UTF-8 file, got {path!r} ({error})")
                continue
            if not texts[language].strip():
                mistakes.append(f"--text: expected a text, got {path!r}, which is empty")
    if mistakes:
        raise ConfigError(mistakes)
    return texts or default_texts()


def measure(name: str, tokenizer: Any, texts: Mapping[str, str]) -> list[Fertility]:
    """Return the counts of one tokenizer on each text.

    Args:
        name: of the tokenizer, for the report.
        tokenizer: a fast tokenizer of transformers.
        texts: language -> text.

    Raises:
        ConfigError: a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            [
                f"{name}: expected a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}"
            ]
        )
    found: list[Fertility] = []
    for language, text in texts.items():
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        pieces = _pieces_of_words(text, offsets)
        has_words = language.split("-")[0].lower() not in NO_SPACES
        first = found[0].tokens if found else len(offsets)
        found.append(
            Fertility(
                tokenizer=name,
                language=language,
                vocabulary=len(tokenizer),
                tokens=len(offsets),
                bytes_per_token=len(text.encode()) / len(offsets),
                fertility=len(offsets) / len(pieces) if has_words else None,
                continued=sum(n > 1 for n in pieces) / len(pieces) if has_words else None,
                premium=len(offsets) / first,
            )
        )
    return found


def _pieces_of_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of tokens in each word; a token counts for the word of its first letter."""
    starts = [
        i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())
    ]
    word_at: dict[int, int] = {}
    for word, (start, end) in enumerate(pairwise([*starts, len(text)])):
        word_at |= {i: word for i in range(start, end) if not text[i].isspace()}
    pieces = [0] * len(starts)
    for start, end in offsets:
        word = next((word_at[i] for i in range(start, end) if i in word_at), None)
        if word is not None:
            pieces[word] += 1
    return pieces


def vocabulary_costs(sizes: Mapping[str, int], model: Any) -> list[VocabularyCost]:
    """Return what each vocabulary costs in a model of this config.

    Args:
        sizes: tokenizer -> number of tokens.
        model: a ``HybridConfig``; its own vocabulary is replaced.
    """
    from hybrid.plan import plan

    cost = plan(model, 1)
    body = cost.parameters - cost.embedding_parameters
    matrices = 1 if model.tie_word_embeddings else 2
    found = []
    for name, size in sizes.items():
        own = matrices * size * model.hidden_size
        found.append(
            VocabularyCost(
                name, size, own, own / (body + own), 2 * size * model.hidden_size, 4 * size
            )
        )
    return found


def report(
    names: Sequence[str], texts: Mapping[str, str], model: Any = None
) -> tuple[list[Fertility], list[VocabularyCost]]:
    """Compare tokenizers.

    Args:
        names: ``bytes``, folders or names on the hub.
        texts: language -> text; the first language is what premiums are relative to.
        model: a ``HybridConfig`` for the cost of the vocabularies; None for no cost.
    """
    found = [row for name in names for row in measure(name, load_tokenizer(name), texts)]
    sizes = {row.tokenizer: row.vocabulary for row in found}
    return found, [] if model is None else vocabulary_costs(sizes, model)


HEADS = ("tokenizer", "language", "tokens", "bytes/token", "fertility", "continued", "premium")
COST_HEADS = ("tokenizer", "vocabulary", "parameters", "share", "head FLOPs/token", "logits/token")


def rows(found: Sequence[Fertility]) -> list[list[str]]:
    """Return the rows of the first table."""
    return [
        [
            *(row.tokenizer, row.language, str(row.tokens), f"{row.bytes_per_token:.2f}"),
            "-" if row.fertility is None else f"{row.fertility:.2f}",
            "-" if row.continued is None else f"{row.continued:.1%}",
            f"{row.premium:.2f}",
        ]
        for row in found
    ]


def cost_rows(costs: Sequence[VocabularyCost]) -> list[list[str]]:
    """Return the rows of the second table."""
    return [
        [
            *(c.tokenizer, f"{c.vocabulary:,}", f"{c.parameters:,}", f"{c.share:.1%}"),
            *(f"{c.head_flops:,}", f"{c.logit_bytes:,} B"),
        ]
        for c in costs
    ]


def write(path: Path, found: Sequence[Fertility], costs: Sequence[VocabularyCost]) -> None:
    """Write a report as Markdown, CSV (without costs) or JSON, by the ending of the name.

    Raises:
        ConfigError: another ending.
    """
    check_format(path)
    if path.suffix == ".json":
        values = {"texts": [vars(row) for row in found], "vocabularies": [vars(c) for c in costs]}
        write_json(path, values)
    elif path.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(vars(found[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in found)
        write_text(path, buffer.getvalue())
    else:
        tables = [(HEADS, rows(found)), *([(COST_HEADS, cost_rows(costs))] if costs else [])]
        text = [
            "\n".join(f"| {' | '.join(line)} |" for line in [h, ["---"] * len(h), *body])
            for h, body in tables
        ]
        write_text(path, "\n\n".join(["# Tokenizers", *text]) + "\n")


def check_format(path: Path) -> None:
    """Refuse a report in another format.

    Raises:
        ConfigError: the ending is not one of ``FORMATS``.
    """
    if path.suffix not in FORMATS:
        raise ConfigError([f"--out: expected a file in {', '.join(FORMATS)}, got {str(path)!r}"])


def run_report(
    names: Sequence[str], texts: Sequence[str], model: str | None, out: str | None
) -> None:
    """Compare tokenizers and print the tables; see ``hybrid tokenizer --help``.

    Raises:
        ConfigError: a tokenizer, text or config that cannot be used.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from hybrid.plan import load_model_config
    from hybrid.terminal import console

    if out is not None:
        check_format(Path(out))
    config = None if model is None else load_model_config(model)
    found, costs = report(names, read_texts(texts), config)
    tables = [("Texts", HEADS, rows(found)), ("Vocabularies", COST_HEADS, cost_rows(costs))]
    for title, heads, body in tables if costs else tables[:1]:
        table = Table(*heads, title=title, box=SIMPLE_HEAD)
        for row in body:
            table.add_row(*row)
        console().print(table)
    if out is not None:
        write(Path(out), found, costs)
        print(f"report: {out}")
