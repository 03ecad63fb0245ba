"""``hybrid generate``: streamed text generation and conversations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, TextStreamer, set_seed
from transformers.utils import logging

from hybrid.checkpoint_paths import check_weights, newest_checkpoint
from hybrid.config.options import ConfigError
from hybrid.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        max_new_tokens: maximum number of tokens after a prompt.
        temperature: divisor of the logits; 0 for greedy decoding.
        top_p: sample from the smallest set of tokens with this total probability.
        top_k: sample from the k most probable tokens; 0 for all.
        repetition_penalty: values above 1 make tokens that occurred before less likely.
        seed: seed of the random numbers.
    """

    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value outside its range.
        """
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1"),
        )
        mistakes = [
            f"--{name.replace('_', '-')}: expected {wanted}, got {getattr(self, name)}"
            for name, valid, wanted in ranges
            if not valid
        ]
        if mistakes:
            raise ValueError("; ".join(mistakes))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``generate``."""
        common = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature == 0:
            return {**common, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **common,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


class Generator:
    """Text generation with a model and its tokenizer.

    Args:
        source: folder or hub name of any causal language model.
        tokenizer: name or folder; None for that of the model.
        dtype: dtype of the weights, e.g. ``bfloat16``; None for that of the checkpoint.
        device: e.g. ``cuda``; None for an accelerator if there is one, else the CPU.

    Raises:
        ValueError: the model cannot be loaded, or it has no tokenizer.
    """

    model: Any  # PreTrainedModel, whose mixins have no precise types
    tokenizer: Any  # PreTrainedTokenizerBase

    def __init__(
        self,
        source: str,
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        source = _newest_checkpoint(source)
        check_weights(source)
        try:
            self.tokenizer = load_tokenizer(tokenizer or source)
        except ConfigError as error:
            if tokenizer is not None or (Path(source) / "tokenizer.json").exists():
                raise  # there is one, which cannot be used
            _check_is_folder(source)
            line = "expected a tokenizer in the checkpoint, got none; try --tokenizer bytes"
            raise ValueError(f"{source}: {line}") from error
        try:
            self.model = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(dtype))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source}: {str(error).strip().splitlines()[0]}") from error
        self.model.to(_device(device)).eval()
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            wanted = f"expected at most {rows} tokens, the rows of the model's embedding"
            raise ValueError(
                f"--tokenizer: {wanted}, got {len(self.tokenizer)}; try the tokenizer of the model"
            )
        _warn_of_unknown_ids(rows, len(self.tokenizer))

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def complete(self, prompt: str, sampling: Sampling, write: Callable[[str], Any]) -> str:
        """Continue a text.

        Args:
            prompt: the text; an empty one starts from the first special token of the tokenizer.
            sampling: sampling parameters.
            write: called with each piece of decoded text.

        Returns:
            The new text.
        """
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].long()
        if ids.shape[1] == 0:
            first = self.tokenizer.bos_token_id
            first = self.tokenizer.eos_token_id if first is None else first
            if first is None:
                line = "expected at least one token, got none, and the tokenizer has no first token"
                raise ValueError(f"PROMPT: {line}; try some text")
            ids = torch.tensor([[first]])
        return self._continue(ids, sampling, write)

    def answer(
        self, messages: Sequence[Message], sampling: Sampling, write: Callable[[str], Any]
    ) -> str:
        """Answer the last message of a conversation, formatted with the tokenizer's chat template.

        Raises:
            ValueError: the tokenizer has no template.
        """
        if not self.has_template:
            raise ValueError(
                "--chat: expected a tokenizer with a chat template, got none; try without --chat"
            )
        inputs = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._continue(inputs["input_ids"], sampling, write)

    def _continue(self, ids: torch.Tensor, sampling: Sampling, write: Callable[[str], Any]) -> str:
        streamer = _Pieces(self.tokenizer, write)
        set_seed(sampling.seed)
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                pad_token_id=self._pad_token(),
                **self._stops(),
                **sampling.arguments(),
            )
        return "".join(streamer.pieces)

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _stops(self) -> dict[str, Any]:
        """Return the tokenizer's end-of-text token if the model has none."""
        if getattr(self.model.generation_config, "eos_token_id", None) is not None:
            return {}
        return {"eos_token_id": self.tokenizer.eos_token_id}


class _Pieces(TextStreamer):
    """Streamer that passes decoded text to a function instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive final text from ``TextStreamer``."""
        self.pieces.append(text)
        self.write(text)


def generate_text(
    source: str,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    chat: bool = False,
    system: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> int:
    """Run the command: print the continuation of each prompt, or hold a conversation.

    Without prompts, lines are read from standard input: separate prompts, or with ``chat`` the
    messages of one conversation.

    Raises:
        ValueError: see ``Generator`` and ``Sampling``.
    """
    logging.disable_progress_bar()  # standard output is for text
    generator = Generator(source, tokenizer, dtype, device)
    if chat or system is not None:
        return _converse(generator, prompts or _lines("you> "), sampling, system)
    for prompt in prompts or _lines("> "):
        _write(prompt)
        generator.complete(prompt, sampling, _write)
        _write("\n")
    return 0


def _converse(
    generator: Generator, turns: Iterable[str], sampling: Sampling, system: str | None
) -> int:
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = generator.answer(messages, sampling, _write)
        messages.append({"role": "assistant", "content": answer})
        _write("\n")
    return 0


def _lines(mark: str) -> Iterable[str]:
    """Yield lines of standard input, with a prompt if it is a terminal."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            try:
                line = input(mark)
            except EOFError:
                _write("\n")
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        if line.strip():
            yield line.rstrip("\n")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _warn_of_unknown_ids(rows: int, tokens: int) -> None:
    """Warn if the model has many more ids than the tokenizer; a few rows are padding."""
    if rows - tokens > max(128, tokens // 10):
        print(
            f"warning: the model has {rows:,} ids, the tokenizer {tokens:,}: text of the other ids"
            " is empty; try the tokenizer that the model was trained with",
            file=sys.stderr,
        )


def _newest_checkpoint(source: str) -> str:
    """Return the folder of a model; for a run that is not finished, that of its newest checkpoint."""
    newest = newest_checkpoint(source)
    if newest is None:
        return source
    print(f"{source}: the run has not ended; reading {newest.name}", file=sys.stderr)
    return str(newest)


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without it
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--device: expected a device of this machine, got {name!r} ({line})"
        ) from error
    return device


def _dtype(name: str | None) -> torch.dtype | str:
    if name is None:
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {name!r}")
    return dtype


def _check_is_folder(source: str) -> None:
    """Raise ValueError for a path, rather than the name of a repository, that is no folder."""
    path = Path(source)
    if not path.is_dir() and (path.exists() or path.is_absolute() or source.startswith(".")):
        got = "a file" if path.exists() else "none"
        raise ValueError(
            f"{source}: expected the folder of a checkpoint, got {got}; try the folder that holds"
            " config.json"
        )
