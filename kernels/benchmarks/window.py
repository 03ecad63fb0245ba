"""Time a layer of sliding-window attention, and compare two checkouts of this repository.

    python kernels/benchmarks/window.py                       # this checkout
    python kernels/benchmarks/window.py --against ../before   # A/B/A/B, each run in a process of its own

On one thread, in float32: a forward pass, a training step and a decode step of a stack of one layer, at
T tokens and a window of W. Process CPU time, the median of all runs, and the growth of the resident set
over the first training step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 512, "vocab_size": 64, "ffn": ""}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--length", type=int, default=4096, help="T")
    parser.add_argument("--window", type=int, default=512, help="W")
    parser.add_argument("--type", default="sliding_window_attention", help="or chunked_attention")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout, in turns")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls in a run")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options)))
        return
    roots = [HERE] + ([options.against.resolve()] if options.against else [])
    runs: dict[Path, list[dict[str, float]]] = {root: [] for root in roots}
    for _ in range(options.rounds):
        for root in roots:
            runs[root].append(run_in(root))
    for root in roots:
        medians = {
            name: statistics.median(run[name] for run in runs[root]) for name in runs[root][0]
        }
        print(root, "  ".join(f"{name} {value:.2f}" for name, value in medians.items()))


def run_in(root: Path) -> dict[str, float]:
    """The figures of one run of a checkout's code."""
    paths = os.pathsep.join(map(str, (root, root / "kernels")))
    command = [sys.executable, __file__, "--once", *sys.argv[1:]]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of CPU of each call, and MiB."""
    import torch
    from transformers import DynamicCache

    import hybrid

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = {"window": options.window}
    if options.type == "chunked_attention":
        size = {"chunk_size": options.window}
    mixer = {"type": options.type, "num_heads": 8, "num_kv_heads": 2, **size}
    config = hybrid.HybridConfig(layout="Q", mixers={"Q": mixer}, **SIZES)
    model = hybrid.HybridForCausalLM(config)
    ids = torch.randint(0, 64, (1, options.length))

    def forward() -> None:
        with torch.no_grad():
            model.model(ids, use_cache=False)

    def train() -> None:
        model.model(ids, use_cache=False).last_hidden_state.sum().backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model.model(ids, past_key_values=cache)

    def decode() -> None:
        with torch.no_grad():
            for _ in range(20):
                model.model(ids[:, :1], past_key_values=cache)

    return {
        "forward ms": milliseconds(forward, options.repeats),
        "training step ms": milliseconds(train, options.repeats),
        "decode step ms": milliseconds(decode, options.repeats) / 20,
        "MiB": grown,
    }


def milliseconds(call: Callable[[], None], repeats: int) -> float:
    """Of process CPU time, the median."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
