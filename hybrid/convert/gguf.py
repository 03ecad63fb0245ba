"""Read GGUF files through transformers."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
# errors of the reader on a damaged file or another format
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
    struct.error,
)  # fmt: skip


def read_gguf(folder: str, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Read a GGUF file with transformers and return the dequantized model.

    Args:
        folder: folder of the file, or a hub name.
        name: name of the file.
        dtype: dtype of the weights; default: float32.

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
    """Write the tokenizer of a GGUF file to a checkpoint folder; warn if there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # tokenizers raises no more specific error
        reason = " ".join(str(error).split())
        logger.warning("%s: no tokenizer that transformers reads: %s", name, reason)
        return
    tokenizer.save_pretrained(out)
