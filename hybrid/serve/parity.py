"""Parity with a server: equal greedy tokens, and log-probabilities within a tolerance.

Both sides decode the same prompts in float32. Log-probabilities are compared up to the first token
that differs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from hybrid.checkpoint_paths import check_source
from hybrid.config.hybrid_config import HybridConfig
from hybrid.convert import export, from_published
from hybrid.files import read_json
from hybrid.modeling.model import HybridForCausalLM
from hybrid.serve.servers import Server, get_server

LENGTHS = (3, 9, 17, 40, 75, 130)
TOKENS = 32


class Decoded(NamedTuple):
    """Tokens decoded after a prompt: token ids and their log-probabilities.

    None for tokens that a server does not report; later tokens show whether they were equal.
    """

    tokens: Sequence[int | None]
    logprobs: Sequence[float | None]


@dataclass(frozen=True)
class Parity:
    """Result of the comparison of one model with one server.

    Attributes:
        family: the published architecture that was served.
        server: name and version of the server.
        tolerance: tolerance of log-probabilities, in nats.
        differences: one line for each prompt whose tokens or log-probabilities differ.
        largest: the largest difference of log-probabilities of equal tokens, in nats.
    """

    family: str
    server: str
    tolerance: float
    differences: tuple[str, ...]
    largest: float

    @property
    def identical(self) -> bool:
        """Whether all tokens are equal, and all log-probabilities within the tolerance."""
        return not self.differences

    def __str__(self) -> str:
        """Format the result, with a line for each prompt that differs."""
        head = (
            f"{self.family} in {self.server}: {'identical' if self.identical else 'differs'}"
            f" (largest difference of log-probabilities {self.largest:.1e},"
            f" tolerance {self.tolerance:.0e})"
        )
        return "\n".join([head, *(f"  {line}" for line in self.differences)])


def parity(
    model: str | Path,
    server: str,
    *,
    python: str | None = None,
    tokens: int = TOKENS,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> Parity:
    """Decode the same prompts with this package and with a server, and compare.

    Args:
        model: folder of a hybrid model, which is exported for mlx and llama.cpp, or of an export.
            With a URL, the model that the server serves.
        server: ``vllm``, ``mlx``, ``llama.cpp``, or the URL of an OpenAI-compatible server.
        python: interpreter of the environment of the server; default: this one.
        tokens: number of tokens to decode.
        lengths: lengths of the prompts, which are random token ids.
        seed: seed of the prompts.

    Raises:
        ValueError: the model cannot be exported, or the server cannot be run; with its message.
    """
    chosen = get_server(server, python)
    (found,) = parities([model], chosen, tokens=tokens, lengths=lengths, seed=seed)
    if isinstance(found, ValueError):
        raise found
    return found


def parities(
    models: Sequence[str | Path],
    server: Server,
    *,
    tokens: int = TOKENS,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> list[Parity | ValueError]:
    """Run ``parity`` for several models in one server process; return an error for each refused
    one.

    Raises:
        ValueError: a model cannot be exported, or the server cannot be run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sides, requests = [], []
        for i, model in enumerate(models):
            ours, folder, family = _both_sides(Path(model), Path(scratch) / str(i), server)
            prompts = random_prompts(ours.config.vocab_size, lengths, seed)
            sides.append((family, [greedy(ours, prompt, tokens) for prompt in prompts]))
            requests.append((folder, prompts))
        answers = server.decode_all(requests, tokens)
    found: list[Parity | ValueError] = []
    for (family, expected), (_, prompts), answer in zip(sides, requests, answers, strict=True):
        if isinstance(answer, ValueError):
            found.append(answer)
            continue
        version, decoded = answer
        theirs = [Decoded(each["tokens"], each["logprobs"]) for each in decoded]
        lines, largest = compare(prompts, expected, theirs, server.tolerance)
        found.append(Parity(family, version, server.tolerance, tuple(lines), largest))
    return found


def _both_sides(model: Path, scratch: Path, server: Server) -> tuple[HybridForCausalLM, Path, str]:
    """Return our model, the folder for the server, and the family."""
    config = read_json(Path(check_source(str(model))) / "config.json")
    if config.get("model_type") != HybridConfig.model_type:
        ours = from_published(model, dtype=torch.float32)
        return ours, model, str(ours.config.imported_from)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not server.reads_exports:
        return loaded.eval(), model, "hybrid"
    return loaded.eval(), scratch / "export", export(model, scratch / "export")


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Return prompts of random token ids, which need no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def greedy(model: HybridForCausalLM, prompt: list[int], count: int) -> Decoded:
    """Return greedy tokens of our model, also after end-of-sequence tokens, with log-probabilities."""
    given, past, tokens, scores = torch.tensor([prompt]), None, [], []
    for _ in range(count):
        out: Any = model(given, past_key_values=past, use_cache=True)
        logprobs = out.logits[0, -1].float().log_softmax(-1)
        token = int(logprobs.argmax())
        tokens.append(token)
        scores.append(float(logprobs[token]))
        given, past = torch.tensor([[token]]), out.past_key_values
    return Decoded(tokens, scores)


def compare(
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Decoded],
    found: Sequence[Decoded],
    tolerance: float,
) -> tuple[list[str], float]:
    """Return a line for each prompt that differs, and the largest difference of equal tokens."""
    lines, largest = [], 0.0
    for prompt, ours, theirs in zip(prompts, expected, found, strict=True):
        pairs = list(zip(ours.tokens, theirs.tokens, strict=False))
        apart = (i for i, (a, b) in enumerate(pairs) if b is not None and a != b)
        agree = next(apart, len(pairs))
        scores = zip(ours.logprobs[:agree], theirs.logprobs[:agree], strict=False)
        gaps = [abs(a - b) for a, b in scores if a is not None and b is not None]
        # ``max`` would ignore NaN
        worst = next((gap for gap in gaps if gap != gap), max(gaps, default=0.0))
        largest = worst if worst != worst else max(largest, worst)
        where = f"prompt of {len(prompt)} tokens: "
        if agree < len(pairs):
            a, b = pairs[agree]
            lines.append(f"{where}token {agree + 1} is {a} here and {b} there ({worst:.1e} before)")
        elif len(ours.tokens) != len(theirs.tokens):
            lines.append(f"{where}{len(theirs.tokens)} tokens there, {len(ours.tokens)} here")
        elif not worst <= tolerance:
            lines.append(f"{where}log-probabilities differ by {worst:.1e}")
    return lines, largest
