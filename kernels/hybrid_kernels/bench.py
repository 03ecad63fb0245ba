"""Time the CPU backend against the PyTorch code that transformers falls back to without a GPU.

    python -m hybrid_kernels.bench                    # T = 1024 and 4096, every op
    python -m hybrid_kernels.bench --ops ssd kda --lengths 16384 --json out.json

Both sides run in one process on one thread, in turns, and process CPU time is what counts; medians
are printed. Peak memory is the growth of the resident set over one call. The share of the GEMM peak
sets the products that our algorithm needs (not those it saves) against a 1024 x 1024 product in the
same run. Each pair is first checked to compute the same thing.

Legend: B = 1 batch, T time, H = 4 heads, K = V = 64 dims, D channels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybrid_kernels import rivals

AGREEMENT = 1e-3


@dataclass
class Result:
    """Figures of one op at one length; seconds of CPU, bytes, and shares of the GEMM peak."""

    op: str
    length: int
    direction: str
    ours: float
    theirs: float
    ratio: float
    our_memory: int
    their_memory: int
    gemm_share: float | None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=list(rivals.PAIRS), default=list(rivals.PAIRS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = gemm_peak()
    header = versions() | {"gemm_gflops": round(peak / 1e9, 1)}
    print("  ".join(f"{name} {value}" for name, value in header.items()))
    print(
        f"{'op':<12}{'T':>7} {'direction':<17}{'ours ms':>9}{'theirs ms':>11}{'ratio':>8}"
        f"{'ours MiB':>10}{'theirs MiB':>12}{'of GEMM peak':>14}"
    )
    results = []
    for op in options.ops:
        for length in options.lengths:
            for result in measure(op, length, options.repeats, options.forward_only, peak):
                results.append(result)
                show(result)
    if options.json:
        found = {"run": header, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Name what is measured, on what."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def show(r: Result) -> None:
    """Print one line of the table."""
    share = "-" if r.gemm_share is None else f"{r.gemm_share:.0%}"
    print(
        f"{r.op:<12}{r.length:>7} {r.direction:<17}{r.ours * 1e3:>9.2f}{r.theirs * 1e3:>11.2f}"
        f"{r.ratio:>7.1f}x{r.our_memory / 2**20:>10.1f}{r.their_memory / 2**20:>12.1f}{share:>14}",
        flush=True,
    )


def measure(op: str, length: int, repeats: int, forward_only: bool, peak: float) -> list[Result]:
    """Time one op at one length, forward and then forward and backward."""
    pair = rivals.PAIRS[op]
    torch.manual_seed(0)
    inputs = pair.inputs(length)
    with torch.no_grad():
        found, expected = pair.ours(**inputs), pair.theirs(**inputs)
    error = float((found - expected).norm() / expected.norm())
    assert error <= AGREEMENT, f"{op}: the two sides differ by {error:g}"
    gradient = torch.randn(expected.shape)
    names = ["forward"] if forward_only or not pair.backward else ["forward", "forward+backward"]
    results = []
    for name in names:
        calls = [_call(f, inputs, gradient, name) for f in (pair.ours, pair.theirs)]
        ours, theirs = interleaved(calls, repeats if name == "forward" else max(1, repeats // 2))
        memory = [peak_memory(call) for call in calls]
        flops = pair.flops(length) * (1 if name == "forward" else pair.backward_flops)
        share = flops / ours / peak if flops else None
        results.append(Result(op, length, name, ours, theirs, theirs / ours, *memory, share))
    return results


def _call(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], gradient: Tensor, direction: str
) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return op(**inputs)

        return forward
    leaves = {
        name: x.clone().requires_grad_(name not in rivals.CONSTANTS) for name, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if x.requires_grad]

    def both() -> object:
        return torch.autograd.grad(op(**leaves), wanted, gradient)

    return both


def interleaved(calls: list[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Return the median CPU seconds of two calls made in turns, after one unmeasured round."""
    times: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            # A call of a few microseconds is below the clock's step: repeat it.
            count, spent = 0, 0.0
            while spent < 0.01:
                start = time.process_time()
                call()
                spent += time.process_time() - start
                count += 1
            if turn:
                found.append(spent / count)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes the resident set grows at most during a call (Linux only)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident(status, "VmRSS")
    call()
    return max(0, _resident(status, "VmHWM") - before)


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def gemm_peak() -> float:
    """Return the FLOP/s of a 1024 x 1024 x 1024 product, the best of a few."""
    x, best = torch.randn(1024, 1024), float("inf")
    for _ in range(10):
        start = time.process_time()
        torch.mm(x, x)
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


if __name__ == "__main__":
    main()
