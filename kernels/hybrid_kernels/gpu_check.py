"""What to run when a GPU is at hand: correctness at real sizes, the benchmark, the tuning sweep.

``python -m hybrid_kernels.gpu_check correctness --out DIR``
    every form, forward, all gradients and final state, packed too, against the reference in float64
``python -m hybrid_kernels.gpu_check bench --out DIR``
    milliseconds against flash-linear-attention, where installed, in this process, taking turns
``python -m hybrid_kernels.gpu_check tune --out DIR``
    a bounded search of block sizes, printed in the form in which ``triton/launch.py`` keeps them

Each writes DIR/<name>.json with the device and the versions. As of now none has been run on a GPU:
nothing about the speed of the Triton kernels is known.

Legend: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.api import linear_attention
from hybrid_kernels.testing import FORMS, TOLERANCE, Form, evaluate, relative_rms, sample

SIZES = (
    (8, 4096, 16, 128),
    (2, 16384, 16, 128),
    (1, 65536, 16, 128),
    (8, 2048, 32, 64),
    (1, 8192, 96, 128),
)
BENCHED = ("additive_scalar", "additive_vector", "delta_scalar", "delta_vector")
DECODE = (64, 1, 32, 128)
ROTATED_INPUTS = 3


def taken() -> list[Form]:
    """Return the forms that the Triton backend takes."""
    return [form for form in FORMS if not form.value_decay]


def environment(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that a result belongs to."""
    found = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    for package in ("triton", "flash-linear-attention", "fla-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


# ---------------------------------------------------------------------------------- correctness


def correctness(device: torch.device, time: int, dim: int) -> list[dict[str, Any]]:
    """Return a row for each form, dtype and kind of gates, with the errors that are too large."""
    rows = []
    for form in taken():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for gates, lengths in (("mild", None), ("closed", None), ("mild", _lengths(time))):
                rows.append(_agreement(form, dtype, gates, lengths, device, time, dim))
                print(_line(rows[-1]), flush=True)
    return rows


def _lengths(time: int) -> list[int]:
    return [time // 3, 0, 1, time - time // 3 - 1]


def _agreement(
    form: Form,
    dtype: torch.dtype,
    gates: str,
    lengths: list[int] | None,
    device: torch.device,
    time: int,
    dim: int,
) -> dict[str, Any]:
    inputs = sample(
        form,
        batch=2,
        time=time,
        key_dim=dim,
        value_dim=dim,
        gates=gates,
        lengths=lengths,
        dtype=dtype,
    )
    inputs = {name: x.to(device) for name, x in inputs.items()}
    # The gradient of the outputs is drawn on the CPU; the ops move it with the loss.
    expected = evaluate(_on(device, "reference"), inputs, dtype=torch.float64)
    found, again = (evaluate(_on(device, "triton"), inputs) for _ in range(2))
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    return {
        "form": form.name,
        "dtype": str(dtype),
        "gates": gates,
        "packed": lengths is not None,
        "errors": errors,
        "wrong": {n: e for n, e in errors.items() if not e <= TOLERANCE[dtype]},
        "same_bits_twice": all(torch.equal(found[name], again[name]) for name in found),
        "causal": _causal(inputs, time),
    }


def _on(device: torch.device, backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def op(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        o, state = linear_attention(**arguments, backend=backend)
        assert state is not None
        assert o.device.type == device.type
        return o.cpu(), state.cpu()

    return op


def _causal(inputs: dict[str, Any], time: int) -> bool:
    """Say whether a change of the second half leaves the first half's outputs bit for bit."""
    half = time // 2
    changed: dict[str, Any] = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v"):
        changed[name][:, half:] *= 0.5
    with torch.no_grad():
        first, second = (
            linear_attention(**tensors, backend="triton")[0]  # pyright: ignore[reportArgumentType]
            for tensors in (inputs, changed)
        )
    return torch.equal(first[:, :half], second[:, :half])


def _line(row: dict[str, Any]) -> str:
    good = not row["wrong"] and row["same_bits_twice"] and row["causal"]
    worst = max(row["errors"].values())
    where = f"{row['form']} {row['dtype']} {row['gates']}{' packed' if row['packed'] else ''}"
    return f"{'ok ' if good else 'BAD'} {where}: worst {worst:.1e} {row['wrong'] or ''}"


# ---------------------------------------------------------------------------------------- speed


def draw(form: Form, size: tuple[int, int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """Return several sets of random bf16 inputs of B, T, H, D, so that caches hold none of them."""
    batch, time, heads, dim = size
    sets: list[dict[str, Any]] = []
    for _ in range(ROTATED_INPUTS):

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        keys = torch.nn.functional.normalize(normal(batch, time, heads, dim), dim=-1)
        found = {"q": normal(batch, time, heads, dim), "k": keys, "v": torch.randn_like(keys)}
        shape = (batch, time, heads, dim) if form.decay == "vector" else (batch, time, heads)
        found["log_decay"] = -0.1 * torch.rand(shape, device=device)
        if form.delta:
            found["beta"] = torch.rand(batch, time, heads, device=device, dtype=torch.bfloat16)
        sets.append(found)
    return sets


def forward_of(inputs: dict[str, Any], backend: str) -> Callable[[], object]:
    """Return the forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return linear_attention(**inputs, backend=backend)

    return run


def training_of(inputs: dict[str, Any], backend: str) -> Callable[[], object]:
    """Return forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gradient = torch.randn_like(inputs["v"])

    def run() -> object:
        o, _ = linear_attention(**leaves, backend=backend)  # pyright: ignore[reportArgumentType]
        return torch.autograd.grad(o, list(leaves.values()), gradient)

    return run


def milliseconds(runs: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Return the median time of each contestant; they take turns, each on rotating inputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 3):
        for name, calls in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[index % len(calls)]()
            end.record()
            end.synchronize()
            if index >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def limits(device: torch.device) -> dict[str, float]:
    """Return what this device reaches now: copy bandwidth in GB/s and bf16 products in TFLOP/s."""
    x = torch.randn(1 << 28, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = milliseconds({"copy": [lambda: y.copy_(x)], "product": [lambda: a @ b]}, rounds=20)
    return {
        "copy_gb_per_s": 2 * x.numel() * 2 / times["copy"] / 1e6,
        "product_tflop_per_s": 2 * 8192**3 / times["product"] / 1e9,
    }


def traffic(inputs: dict[str, Any]) -> int:
    """Return the bytes that any forward pass must move: each input once, the output once."""
    return sum(x.numel() * x.element_size() for x in (*inputs.values(), inputs["v"]))


def bench(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each form, size, pass and backend."""
    named = {form.name: form for form in FORMS}
    contestants = ["triton"]
    if environment(device)["fla-core"] != "absent":
        contestants.append("fla")
    rows = []
    reached = limits(device)
    print(reached)
    for name in BENCHED:
        for size in (*SIZES, DECODE):
            sets = draw(named[name], size, device)
            passes = {"forward": forward_of}
            if size is not DECODE:
                passes["forward+backward"] = training_of
            for label, make in passes.items():
                runs = {who: [make(inputs, who) for inputs in sets] for who in contestants}
                for who, ms in milliseconds(runs, rounds).items():
                    row = {"form": name, "size": size, "pass": label, "backend": who, "ms": ms}
                    if label == "forward":
                        row["gb_per_s"] = traffic(sets[0]) / ms / 1e6
                        row["share_of_copy"] = row["gb_per_s"] / reached["copy_gb_per_s"]
                    rows.append(row)
                    print(row, flush=True)
    return [reached, *rows]


# --------------------------------------------------------------------------------------- tuning


def candidates() -> Iterator[Any]:
    """Yield the configurations that the sweep tries."""
    from hybrid_kernels.triton.launch import Config

    for keys in (16, 32, 64):
        for values in (32, 64):
            for warps in (4, 8):
                for stages in (1, 2):
                    yield Config(keys, values, warps, stages)


def tune(device: torch.device, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Return the best configuration of each kernel of some forms; one kernel varies at a time.

    24 configurations of each kernel, most of the time goes into compiling them: about 10 minutes
    a form.
    """
    from triton.runtime.errors import OutOfResources

    from hybrid_kernels.triton import launch

    named = {form.name: form for form in FORMS}
    kernels = ["states_forward", "states_backward", "outputs_forward", "values_backward"]
    kernels += ["keys_backward", "pairs", "pairs_backward", "new_values", "new_values_backward"]
    rows = []
    for name in names:
        sets = draw(named[name], SIZES[0], device)
        calls = [training_of(inputs, "triton") for inputs in sets]
        shipped = milliseconds({"shipped": calls}, rounds)["shipped"]
        for kernel in kernels:
            if not named[name].delta and kernel.startswith("new_values"):
                continue
            found = []
            for config in candidates():
                try:
                    with launch.override(kernel, config):
                        found.append((milliseconds({"it": calls}, rounds)["it"], config))
                except OutOfResources:
                    continue
            best, config = min(found, key=lambda pair: pair[0])
            row = {"form": name, "kernel": kernel, "shipped_ms": shipped, "best_ms": best}
            row["config"] = dataclasses.asdict(config)
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> int:
    """Run one of the three; return 1 if something disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["correctness", "bench", "tune"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each contestant")
    parser.add_argument("--time", type=int, default=777, help="T of the correctness runs")
    parser.add_argument("--dim", type=int, default=128, help="K and V of the correctness runs")
    parser.add_argument("--form", nargs="+", choices=BENCHED, default=list(BENCHED), help="to tune")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here; the same kernels run under TRITON_INTERPRET=1 in the tests")
    device = torch.device("cuda")
    torch.manual_seed(0)
    if options.what == "correctness":
        rows = correctness(device, options.time, options.dim)
    elif options.what == "bench":
        rows = bench(device, options.rounds)
    else:
        rows = tune(device, options.rounds, options.form)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1))
    bad = [row for row in rows if row.get("wrong") or row.get("causal") is False]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
