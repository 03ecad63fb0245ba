"""Greedy decoding by mlx-lm: a script for the Python of an environment with mlx-lm.

    python mlx_worker.py < requests.jsonl > answers.jsonl

A request has ``folder``, ``prompts`` (lists of token ids) and ``tokens``; an answer has
``version`` and, for each prompt, the token ids and their log-probabilities. The script does not
import this package.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx  # pyright: ignore[reportMissingImports]
from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]
from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Read requests, decode, and write answers."""
    for line in sys.stdin:
        request = json.loads(line)
        model, _ = load_model(Path(request["folder"]))
        model.set_dtype(mx.float32)
        answers = [_greedy(model, prompt, request["tokens"]) for prompt in request["prompts"]]
        print(json.dumps({"version": version("mlx-lm"), "answers": answers}), flush=True)


def _greedy(model, prompt, count):
    cache = make_prompt_cache(model)
    given, tokens, scores = mx.array([prompt]), [], []
    for _ in range(count):
        logits = model(given, cache=cache)[0, -1].astype(mx.float32)
        token = int(mx.argmax(logits))
        scores.append(float(logits[token] - mx.logsumexp(logits)))
        tokens.append(token)
        given = mx.array([[token]])
    return {"tokens": tokens, "logprobs": scores}


if __name__ == "__main__":
    main()
