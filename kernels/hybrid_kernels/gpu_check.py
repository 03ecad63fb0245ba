"""What to run when a GPU is at hand, in this order.

``python -m hybrid_kernels.gpu_check sanitize``
    compute-sanitizer over one launch of each kernel: memory, then races
``python -m hybrid_kernels.gpu_check correctness --out DIR``
    every form, forward, all gradients and final state, packed too, against the reference in float64
``python -m hybrid_kernels.gpu_check bench --out DIR``
    milliseconds against flash-linear-attention and mamba-ssm, where installed, taking turns in this
    process, with the goals beside them (``gpu_bench.py``)
``python -m hybrid_kernels.gpu_check tune --out DIR``
    a bounded search of block sizes, printed in the form in which ``triton/launch.py`` keeps them

All but the first write DIR/<name>.json with the device and the versions. With ``--dry-run`` and
TRITON_INTERPRET=1 each runs on a CPU at tiny sizes: that shows that it works, nothing else. As of
now none has been run on a GPU: nothing about the speed of the Triton kernels is known.

Legend: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels import gpu_bench
from hybrid_kernels.api import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.testing import (
    FORMS,
    TOLERANCE,
    evaluate,
    relative_rms,
    sample,
    sample_scan,
)

Op = Callable[..., tuple[Tensor, Tensor | None]]

PACKAGES = ("triton", "flash-linear-attention", "fla-core", "mamba-ssm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCAN = "selective_scan"
NAMED = {form.name: form for form in FORMS}
CHECKED = (*NAMED, SCAN)
SANITIZERS = ("memcheck", "racecheck")
# Kernels whose blocks are given by the chunk or the keys.
UNTUNED = {"inverse"}
# One name for each set of kernels; between them all kernels of ``linear_attention``.
ONCE = ("additive_scalar", "additive_outer", "delta_vector")


def environment(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that a result belongs to."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "CPU, interpreted: a dry run"
    found = {"device": name, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


# ---------------------------------------------------------------------------------- correctness


def correctness(
    names: list[str], device: torch.device, time: int, dim: int, dtypes: tuple[torch.dtype, ...]
) -> list[dict[str, Any]]:
    """Return a row for each form, dtype and kind of gates, with the errors that are too large."""
    rows = []
    for name in names:
        for dtype in dtypes:
            for gates, lengths in (("mild", None), ("closed", None), ("mild", _lengths(time))):
                op, inputs = _drawn(name, gates, lengths, dtype, time, dim)
                inputs = {n: x.to(device) for n, x in inputs.items()}
                row = {"form": name, "dtype": str(dtype), "gates": gates, "packed": bool(lengths)}
                rows.append({**row, **agreement(op, inputs, TOLERANCE[dtype])})
                print(_line(rows[-1]), flush=True)
    return rows


def _lengths(time: int) -> list[int]:
    return [time // 3, 0, 1, time - time // 3 - 1]


def _drawn(
    name: str, gates: str, lengths: list[int] | None, dtype: torch.dtype, time: int, dim: int
) -> tuple[Op, dict[str, Tensor]]:
    shape: dict[str, Any] = {"batch": 2, "time": time, "lengths": lengths, "dtype": dtype}
    if name == SCAN:
        return selective_scan, sample_scan(
            channels=dim, size=min(16, dim // 2), rate=gates, **shape
        )
    inputs = sample(NAMED[name], key_dim=dim, value_dim=dim, gates=gates, **shape)
    return linear_attention, inputs


def agreement(op: Op, inputs: dict[str, Tensor], tolerance: float) -> dict[str, Any]:
    """Hold the Triton backend of an op against the reference, itself, and the arrow of time."""
    # The gradient of the outputs is drawn on the CPU; the ops move it with the loss.
    expected = evaluate(_on_cpu(op, "reference"), inputs, dtype=torch.float64)
    found, again = (evaluate(_on_cpu(op, "triton"), inputs) for _ in range(2))
    errors = {name: relative_rms(found[name].cpu(), expected[name].cpu()) for name in expected}
    return {
        "errors": errors,
        "wrong": {n: e for n, e in errors.items() if not e <= tolerance},
        "same_bits_twice": all(torch.equal(found[name], again[name]) for name in found),
        "causal": _causal(op, inputs),
    }


def _on_cpu(op: Op, backend: str) -> Op:
    def run(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = op(**arguments, backend=backend)
        assert state is not None
        return o.cpu(), state.cpu()

    return run


def _causal(op: Op, inputs: dict[str, Any]) -> bool:
    """Say whether a change of the second half leaves the first half's outputs bit for bit."""
    changed: dict[str, Any] = {name: x.clone() for name, x in inputs.items()}
    names = ("u", "delta", "B", "C") if "u" in inputs else ("q", "k", "v")
    half = inputs[names[0]].shape[1] // 2
    for name in names:
        changed[name][:, half:] *= 0.5
    with torch.no_grad():
        first, second = (op(**tensors, backend="triton")[0] for tensors in (inputs, changed))
    return torch.equal(first[:, :half], second[:, :half])


def _line(row: dict[str, Any]) -> str:
    good = not row["wrong"] and row["same_bits_twice"] and row["causal"]
    worst = max(row["errors"].values())
    where = f"{row['form']} {row['dtype']} {row['gates']}{' packed' if row['packed'] else ''}"
    return f"{'ok ' if good else 'BAD'} {where}: worst {worst:.1e} {row['wrong'] or ''}"


# ------------------------------------------------------------------------------------- sanitizer


def launch_each(device: torch.device) -> None:
    """Launch every kernel: forward, backward and a decode step, at sizes that fill no block."""
    for name in (*ONCE, SCAN):
        for time in (37, 1):
            op, inputs = _drawn(name, "mild", None, torch.float32, time, 20)
            inputs = {n: x.to(device) for n, x in inputs.items()}
            if time > 1:
                evaluate(op, inputs, backend="triton")
            else:
                with torch.no_grad():
                    op(**inputs, backend="triton")
    x, weight = torch.randn(2, 37, 20, device=device), torch.randn(20, 4, device=device)
    evaluate(causal_conv1d, {"x": x, "weight": weight}, backend="triton")


def sanitize(dry: bool) -> int:
    """Run ``launch_each`` under each of ``SANITIZERS``; return the first exit status but 0."""
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "1", "--target-processes", "all"]
        command += [sys.executable, "-m", "hybrid_kernels.gpu_check", "once"]
        print(" ".join(command), flush=True)
        if dry:
            continue
        # Each tensor its own allocation, so that a read beyond one is a read beyond memory.
        status = subprocess.run(
            command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False
        ).returncode
        if status:
            return status
    return 0


# --------------------------------------------------------------------------------------- tuning


def candidates(kernel: str) -> Iterator[Any]:
    """Yield the configurations that the sweep tries for a kernel."""
    from hybrid_kernels.triton.launch import Config

    scan = kernel.startswith("scan")
    for keys in (8, 16, 32) if scan else (16, 32, 64):
        for values in (8, 16) if scan else (32, 64):
            for warps in (4, 8):
                for stages in (1,) if scan else (1, 2):
                    yield Config(keys, values, warps, stages)


def kernels_of(call: Callable[[], object], device: torch.device) -> list[str]:
    """Return the kernels that a call launches and that have blocks to tune; runs none of them."""
    from hybrid_kernels.triton import launch

    found = set()

    def note(kernel: Any, *_: Any) -> None:
        found.add(kernel.__name__.removesuffix("_kernel"))

    with launch.record(launch.device_class(device), note):
        call()
    return sorted(found - UNTUNED)


def tune(names: list[str], device: torch.device, rounds: int, most: int) -> list[dict[str, Any]]:
    """Return the best configuration of each kernel of some forms; one kernel varies at a time.

    At most 24 configurations of each kernel, most of the time goes into compiling them: about 10
    minutes a form.
    """
    from triton.runtime.errors import OutOfResources

    from hybrid_kernels.triton import launch

    size = gpu_bench.SIZES[0] if device.type == "cuda" else gpu_bench.TINY[0]
    rows = []
    for name in names:
        subject = gpu_bench.SUBJECTS[name]
        ours = subject.contestants["triton"]
        sets = [subject.draw(size, device) for _ in range(gpu_bench.ROTATED_INPUTS)]
        calls = [gpu_bench.call_of(ours, inputs, "forward+backward") for inputs in sets]

        def timed(calls: list[Callable[[], object]] = calls) -> float:
            return gpu_bench.milliseconds({"it": calls}, rounds, device)["it"]

        shipped = timed()
        for kernel in kernels_of(calls[0], device):
            found = []
            for config in list(candidates(kernel))[:most]:
                try:
                    with launch.override(kernel, config):
                        found.append((timed(), config))
                except OutOfResources:
                    continue
            best, config = min(found, key=lambda pair: pair[0])
            row = {"form": name, "kernel": kernel, "shipped_ms": shipped, "best_ms": best}
            rows.append({**row, "config": dataclasses.asdict(config)})
            print(f'"{kernel}": {config},  # {name}: {best:.3f} ms, shipped {shipped:.3f}')
    return rows


# ----------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; what cannot be run here or names nothing is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sanitize", "once", "correctness", "bench", "tune"])
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--form", nargs="+", help="some forms or subjects instead of the usual")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each contestant")
    parser.add_argument("--time", type=int, default=777, help="T of the correctness runs")
    parser.add_argument("--dim", type=int, default=128, help="K and V of the correctness runs")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, interpreted")
    options = parser.parse_args(arguments)
    usual = {"correctness": CHECKED, "bench": gpu_bench.BENCHED, "tune": gpu_bench.BENCHED}
    known = CHECKED if options.what == "correctness" else tuple(gpu_bench.SUBJECTS)
    options.form = options.form or list(usual.get(options.what, ()))
    for name in options.form:
        if name not in known:
            parser.error(f"unknown form {name!r}; {options.what} knows {', '.join(known)}")
    if options.what in usual and options.out is None:
        parser.error(f"{options.what} needs --out, a folder for its JSON")
    if options.dry_run:
        options.rounds, options.time, options.dim = 1, 7, 4
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--dry-run needs TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        parser.error("no GPU here; add --dry-run and TRITON_INTERPRET=1 to try the script itself")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run one of them; return 1 if something disagrees."""
    options = parse(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    if options.what == "sanitize":
        return sanitize(options.dry_run)
    if options.what == "once":
        launch_each(device)
        return 0
    if options.what == "correctness":
        dtypes = DTYPES[:1] if options.dry_run else DTYPES
        rows = correctness(options.form, device, options.time, options.dim, dtypes)
    elif options.what == "bench":
        rows = gpu_bench.bench(options.form, device, options.rounds)
    else:
        rows = tune(options.form, device, options.rounds, most=2 if options.dry_run else 24)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1))
    bad = [row for row in rows if row.get("wrong") or row.get("causal") is False]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
