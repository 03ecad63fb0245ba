"""Tokenizers: ``bytes``, which needs no download, and any Hugging Face tokenizer by name or path.

The byte tokenizer is a stock ``tokenizers`` byte-level model without merges: the id of a byte is
its value, and three special tokens follow. Loading it from a checkpoint does not require this
package.
"""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from hybrid.checkpoint_paths import check_source
from hybrid.config.options import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer of 259 tokens: ids 0..255 are the bytes of UTF-8, then pad,
    bos, eos.

    ``decode(encode(text)) == text`` for any valid UTF-8 text. With ``split_special_tokens=True``,
    the text of a special token is encoded as its bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    vocabulary = {letters[value]: value for value in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, BOS, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether ids below 256 are the bytes of UTF-8, so that encoding equals ``str.encode``."""
    special = tokenizer.convert_tokens_to_ids([PAD, BOS, EOS])
    return len(tokenizer) == 259 and special == [256, 257, 258]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer: ``bytes``, a folder, or a name on the hub.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or the name is a misspelling of ``bytes``.
    """
    if not isinstance(name, str):
        raise ConfigError([f"tokenizer: expected a name, got {type(name).__name__} {name!r}"])
    if name == BYTES:
        return byte_tokenizer()
    near = difflib.get_close_matches(name.lower(), [BYTES], cutoff=0.75)
    # before the request to the hub, which is slow without a network and fails with another message
    if near and "/" not in name and not os.path.exists(name):
        raise ConfigError([f"tokenizer: unknown tokenizer {name!r}, did you mean {BYTES!r}?"])
    from transformers import AutoTokenizer

    try:
        check_source(name)
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # `tokenizers` raises plain Exception for a file that it cannot use
        reason = str(error).strip().split("\n", 1)[0]
        problem = (
            f"tokenizer: expected 'bytes', a folder with a tokenizer, or a name on the hub, got"
            f" {name!r} ({reason})"
        )
        raise ConfigError([problem]) from error
