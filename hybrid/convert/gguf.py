"""GGUF files, which transformers reads."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
# what the reader trips over in a file that is damaged, or is not one
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    struct.error,
)  # fmt: skip


def read_gguf(folder: str, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a GGUF file, dequantized, as transformers reads it.

    Args:
        folder: that the file is in, or the hub name of one.
        name: of the file.
        dtype: of the weights; default: float32.

    Raises:
        ValueError: a damaged file, or an architecture that transformers does not read from GGUF.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype or torch.float32
        )
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{Path(folder) / name}: cannot be read as GGUF: {reason}") from error


def save_tokenizer(folder: str, name: str, out: Path) -> None:
    """Write the tokenizer of a GGUF file into a checkpoint folder; warn where it has none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # tokenizers raises no narrower one
        reason = " ".join(str(error).split())
        logger.warning("%s: no tokenizer that transformers reads: %s", name, reason)
        return
    tokenizer.save_pretrained(out)
