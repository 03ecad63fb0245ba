"""Tokens a second of vLLM with the plugin against ``generate``, and what a GPU adds to the checks.

    python kernels/benchmarks/serving.py [--layout LLLS] [--layers 8] [--hidden-size 512]

Run it in an environment that has vLLM (docs/serving.md). Both sides decode the same random model
greedily after the same prompts, in turns, and the figures are medians over rounds. On a CPU the clock is
the process's CPU time with one thread, so that a busy machine disturbs both alike; on a GPU it is wall
time.

On a GPU the script first checks what a CPU cannot show, and stops with status 1 if a check fails:

- the greedy tokens of vLLM in float32 are those of ``generate``;
- a decode step never waits for the device (``torch.cuda.set_sync_debug_mode``);
- with ``--graphs``: the same tokens in float32 without ``enforce_eager``.

As of now none has been run on a GPU.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

import hybrid

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def save_random(folder: str, arguments: argparse.Namespace) -> None:
    """Save a random model of the sizes asked for."""
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        layout=arguments.layout,
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=2 * (arguments.prompt + arguments.tokens),
    )
    hybrid.HybridForCausalLM(config).save_pretrained(folder)


class Ours:
    """``generate`` of this package."""

    def __init__(self, folder: str, arguments: argparse.Namespace) -> None:
        dtype = getattr(torch, arguments.dtype)
        model = hybrid.HybridForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(arguments.device).eval()
        self.tokens = arguments.tokens

    @torch.no_grad()
    def __call__(self, prompts: torch.Tensor) -> list[list[int]]:
        """Return the new tokens of each prompt (B, T)."""
        prompts = prompts.to(self.model.device)
        out = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, prompts.shape[1] :].tolist()


class Served:
    """vLLM, in this process."""

    def __init__(self, folder: str, arguments: argparse.Namespace, eager: bool = True) -> None:
        from vllm import LLM, SamplingParams

        self.engine = LLM(
            folder,
            dtype=arguments.dtype,
            enforce_eager=eager,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self.sampling = SamplingParams(
            temperature=0, max_tokens=arguments.tokens, ignore_eos=True, detokenize=False
        )

    def __call__(self, prompts: torch.Tensor) -> list[list[int]]:
        """Return the new tokens of each prompt (B, T)."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
        answers = self.engine.generate(given, self.sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]


def decode_without_waiting(served: Served, prompts: torch.Tensor) -> None:
    """Decode with an error at every wait for the device within the model.

    Raises:
        RuntimeError: the model waited in a decode step.
    """
    runner: Any = served.engine.llm_engine.model_executor.driver_worker.worker.model_runner
    forward = runner.model.forward

    def watched(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        decodes = input_ids is not None and len(input_ids) == len(prompts)
        torch.cuda.set_sync_debug_mode("error" if decodes else "default")
        try:
            return forward(input_ids, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.model.forward = watched
    try:
        served(prompts)
    finally:
        runner.model.forward = forward


def check_gpu(folder: str, ours: Ours, arguments: argparse.Namespace, prompts: Any) -> list[str]:
    """Run the checks of the module's docstring; return what failed."""
    failed = []
    expected = ours(prompts)
    served = Served(folder, arguments)
    exact = arguments.dtype == "float32"
    if exact and served(prompts) != expected:
        failed.append("tokens differ from generate")
    try:
        decode_without_waiting(served, prompts)
    except RuntimeError as error:
        failed.append(f"a decode step waits for the device: {error}")
    del served
    if exact and arguments.graphs and Served(folder, arguments, eager=False)(prompts) != expected:
        failed.append("tokens with captured graphs differ from generate")
    return failed


def rate(run: Any, prompts: torch.Tensor, arguments: argparse.Namespace) -> float:
    """Return tokens a second of one call."""
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    started = clock()
    run(prompts)
    return len(prompts) * arguments.tokens / (clock() - started)


def main() -> int:
    """Check on a GPU, then measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", default="LLLS")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--graphs", action="store_true", help="check captured graphs, too")
    arguments = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    prompts = torch.randint(
        arguments.vocab_size, (16, arguments.prompt), generator=torch.Generator().manual_seed(1)
    )
    with tempfile.TemporaryDirectory() as folder:
        save_random(folder, arguments)
        ours = Ours(folder, arguments)
        if arguments.device != "cpu" and (failed := check_gpu(folder, ours, arguments, prompts)):
            print("failed:", *failed, sep="\n  ")
            return 1
        served = Served(folder, arguments)
        for batch in (1, 16):
            rates: dict[str, list[float]] = {"generate": [], "vLLM": []}
            for number in range(arguments.rounds + 1):
                for name, run in (("generate", ours), ("vLLM", served)):
                    found = rate(run, prompts[:batch], arguments)
                    if number:  # the first round warms up
                        rates[name].append(found)
            medians = {name: statistics.median(each) for name, each in rates.items()}
            text = ", ".join(f"{name} {value:,.0f}" for name, value in medians.items())
            print(
                f"batch {batch}: {text} tokens/s, ratio {medians['vLLM'] / medians['generate']:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
