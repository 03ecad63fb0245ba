"""Throughput of ``mixture_of_experts`` and of transformers' Qwen3-MoE block of the same size.

    python -m hybrid.ffn.benchmark [--tokens 1024] [--backend grouped_mm] [--rounds 7]

Forward and backward on the CPU with equal weights and input, alternating in one process. Times are
CPU time of the process and figures are medians over rounds, so that other load on the machine
affects both equally.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hybrid.config.hybrid_config import HybridConfig
from hybrid.modeling.backends import use_backends_of


def build_pair(arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Return our layer and transformers' block, with equal weights."""
    theirs_config = Qwen3MoeConfig(
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=arguments.intermediate_size,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,
        experts_implementation=arguments.backend,
    )
    config = HybridConfig(
        layout="S",
        ffn="E",
        hidden_size=arguments.hidden_size,
        feed_forwards={
            "E": {
                "num_experts": arguments.experts,
                "top_k": arguments.top_k,
                "intermediate_size": arguments.intermediate_size,
            }
        },
        experts_implementation=arguments.backend,
    )
    theirs = Qwen3MoeSparseMoeBlock(theirs_config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = config.stack.feed_forwards["E"].build(0)
    use_backends_of(config, ours)
    weights = {name.replace("gate.", "router."): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    return ours, theirs


def one_pass(block: nn.Module, x: torch.Tensor, direction: torch.Tensor) -> float:
    """Return the CPU time in seconds of a forward and a backward."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    started = time.process_time()
    (block(x) * direction).sum().backward()
    return time.process_time() - started


def main() -> None:
    """Measure and print the throughput of both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=128)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--backend", default="grouped_mm")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = build_pair(arguments)
    x, direction = torch.randn(2, 1, arguments.tokens, arguments.hidden_size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    blocks = [("ours", ours), ("transformers", theirs)]
    for number in range(arguments.rounds + 1):
        blocks.reverse()  # neither always runs first
        for name, block in blocks:
            taken = one_pass(block, x, direction)
            if number:  # the first round warms up
                seconds[name].append(taken)
    rates = {name: arguments.tokens / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:>12}: {rate:,.0f} tokens/s of CPU time, forward and backward")
    pairs = zip(seconds["transformers"], seconds["ours"], strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    print(f"{'ratio':>12}: {ratio:.3f} (median over rounds; above 1, ours is faster)")


if __name__ == "__main__":
    main()
