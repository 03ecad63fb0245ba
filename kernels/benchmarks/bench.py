"""Time the CPU backend against the PyTorch code that transformers falls back to without a GPU.

    python kernels/benchmarks/bench.py                    # T = 1024, 4096, 16384, every op and step
    python kernels/benchmarks/bench.py --ops ssd kda --lengths 4096 --json out.json

Both sides run in one process on one thread, in turns, and process CPU time is what counts; medians
are printed. Peak memory is the growth of the resident set over one call, the median of five where
a call takes less than a second. The share of the GEMM peak sets the products that our algorithm
needs (not those it saves) against a 1024 x 1024 product in the same run. Each pair is first checked
to compute the same thing. Beside each figure that has a target stands the target, met or missed.

How time grows with T is measured of our side alone, the heap handed back to the system before each
call: otherwise the C library recycles a short call's results and maps a long one's afresh.

Shapes: B = 1 batch, T time, H = 4 heads, K = V = 64 dims, D channels.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import baseline_steps
import baselines
import bench_report
from bench_report import Growth, Result

AGREEMENT = 1e-3
# How many seconds of CPU a call of the other side may take before it is timed once only.
SLOW_CALL = 5.0
GROWTH_LENGTHS = (4096, 16384)

PAIRS = {**baselines.PAIRS, **baseline_steps.STEPS}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="leave the other side out where a call would take more than so many seconds, "
        "judged by a shorter length and quadratic growth",
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = gemm_peak()
    run = versions() | {"gemm_gflops": f"{peak / 1e9:.0f}"}
    print("  ".join(f"{name} {value}" for name, value in run.items()))
    print(bench_report.heading())
    results: list[Result] = []
    growth: list[Growth] = []
    for op in options.ops:
        for result in measure_op(op, options, peak):
            results.append(result)
            print(bench_report.row(result), flush=True)
    for op in options.ops:
        if set(GROWTH_LENGTHS) <= set(options.lengths) and PAIRS[op].backward:
            for found in measure_growth(op, options.forward_only, options.repeats):
                growth.append(found)
                print(bench_report.growth_row(found), flush=True)
    # Other work on the machine takes the caches that our side is cut for.
    run["load_average"] = f"{os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(bench_report.verdict(results, growth))
    if options.json:
        bench_report.write_json(options.json, run, results, growth)
    if options.markdown:
        bench_report.write_markdown(options.markdown, run, results, growth)


def versions() -> dict[str, str]:
    """Name what is measured, on what."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def measure_op(op: str, options: argparse.Namespace, peak: float) -> list[Result]:
    """Time one op at every length; a step has no length."""
    results: list[Result] = []
    for length in sorted(options.lengths) if PAIRS[op].backward else [1]:
        expected = {
            r.direction: r.theirs * (length / r.length) ** 2
            for r in results
            if r.theirs is not None
        }
        left_out = [name for name, seconds in expected.items() if seconds > options.patience]
        left_out += [r.direction for r in results if r.theirs is None]
        results += measure(op, length, options.repeats, options.forward_only, peak, left_out)
    return results


def measure(
    op: str, length: int, repeats: int, forward_only: bool, peak: float, left_out: list[str]
) -> list[Result]:
    """Time one op at one length, forward and then forward and backward.

    Args:
        op: a key of ``PAIRS``.
        length: T.
        repeats: timed calls of each side.
        forward_only: leave the backward pass out.
        peak: of matrix products, in FLOP/s.
        left_out: the directions in which the other side is not run.
    """
    pair, inputs = PAIRS[op], _inputs(op, length)
    with torch.no_grad():
        found = pair.ours(**inputs)
        if "forward" not in left_out:
            expected = pair.theirs(**inputs)
            error = float((found - expected).norm() / expected.norm())
            assert error <= AGREEMENT, f"{op}: the two sides differ by {error:g}"
    gradient = torch.randn(found.shape)
    results = []
    for name in _directions(op, forward_only):
        sides = [pair.ours] if name in left_out else [pair.ours, pair.theirs]
        calls = [_call(f, inputs, gradient, name) for f in sides]
        with torch.set_grad_enabled(name != "forward"):
            seconds = interleaved(calls, repeats if name == "forward" else max(1, repeats // 2))
            memory = [
                # Where the heap grows is up to what was freed before: one look is off by a fifth.
                round(statistics.median(peak_memory(call) for _ in range(5 if spent < 1 else 1)))
                for call, spent in zip(calls, seconds, strict=True)
            ]
        flops = pair.flops(length) * (1 if name == "forward" else pair.backward_flops)
        share = flops / seconds[0] / peak if flops else None
        both = len(calls) == 2
        results.append(
            Result(
                op,
                length,
                name,
                seconds[0],
                seconds[1] if both else None,
                memory[0],
                memory[1] if both else None,
                share,
            )
        )
    return results


def measure_growth(op: str, forward_only: bool, repeats: int) -> list[Growth]:
    """Time our side at two lengths, in turns, each call starting from a trimmed heap."""
    found = []
    for name in _directions(op, forward_only):
        calls = []
        for length in GROWTH_LENGTHS:
            inputs = _inputs(op, length)
            with torch.no_grad():
                gradient = torch.randn(PAIRS[op].ours(**inputs).shape)
            calls.append(_call(PAIRS[op].ours, inputs, gradient, name))
        with torch.set_grad_enabled(name != "forward"):
            short, long = interleaved(calls, repeats, trimmed=True)
        found.append(Growth(op, name, *GROWTH_LENGTHS, short, long))
    return found


def _directions(op: str, forward_only: bool) -> list[str]:
    return ["forward"] if forward_only or not PAIRS[op].backward else list(bench_report.DIRECTIONS)


def _inputs(op: str, length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return PAIRS[op].inputs(length)


def _call(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], gradient: Tensor, direction: str
) -> Callable[[], object]:
    if direction == "forward":
        return functools.partial(op, **inputs)
    leaves = {
        name: x.clone().requires_grad_(name not in baselines.CONSTANTS)
        for name, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if x.requires_grad]

    def both() -> object:
        return torch.autograd.grad(op(**leaves), wanted, gradient)

    return both


def interleaved(
    calls: list[Callable[[], object]], repeats: int, trimmed: bool = False
) -> list[float]:
    """Return the median CPU seconds of calls made in turns, after one round that does not count.

    Args:
        calls: what to time.
        repeats: rounds that count; where a call of the first round is slow, that one only.
        trimmed: hand free memory back to the system before every call.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        if turn == 1 and max(found[0] for found in times) > SLOW_CALL:
            return [found[0] for found in times]
        for call, found in zip(calls, times, strict=True):
            # A call of a few microseconds is below the clock's step: repeat it, ever more often
            # between two looks at the clock, which cost something too.
            count, spent = 0, 0.0
            while spent < 0.01:
                calls_at_once = 1 if trimmed else max(1, count)
                if trimmed:
                    _trim()
                start = time.process_time()
                for _ in range(calls_at_once):
                    call()
                spent += time.process_time() - start
                count += calls_at_once
            found.append(spent / count)
    return [statistics.median(found[1:]) for found in times]


def peak_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes the resident set grows at most during a call (Linux only)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    _trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident(status, "VmRSS")
    call()
    return max(0, _resident(status, "VmHWM") - before)


def _trim() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


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
