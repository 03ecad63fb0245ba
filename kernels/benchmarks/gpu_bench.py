"""What ``python kernels/benchmarks/gpu_check.py bench`` times: subjects, contestants, goals.

Each subject is drawn once for a size and given to every contestant in its own layout; contestants
take turns in one process, each on several sets of random inputs, and medians are compared.

Shapes: B batch, T time, H heads, K key dim, V value dim, N state size of Mamba.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from hybrid_kernels.api import linear_attention, selective_scan
from hybrid_kernels.testing import FORMS, Form

Inputs = dict[str, Tensor]
Size = tuple[int, int, int, int]

# B, T, H, K = V.
SIZES: tuple[Size, ...] = (
    (8, 4096, 16, 128),
    (2, 16384, 16, 128),
    (1, 65536, 16, 128),
    (8, 2048, 32, 64),
    (1, 8192, 96, 128),
)
DECODE: Size = (64, 1, 32, 128)
TINY: tuple[Size, ...] = ((1, 5, 1, 8), (2, 1, 1, 8))
MAMBA_STATES = 16
SSD_CHUNK = 256
ROTATED_INPUTS = 3
WARM_UP = 3
# Cycles that the device waits before it starts on what is timed, about 2 ms: the host has launched
# all kernels of a call by then, and the time between the events is the device's alone.
HEAD_START = 4_000_000
CALLS_IN_A_ROW = 10
# Rows of a chunk in the count of operations: what the kernels here take.
CHUNK = 64

# What a kernel that is broken here, or wants more memory than there is, raises.
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, TritonError)

PASSES = ("forward", "backward", "forward+backward")

# Milliseconds on an H200 in bfloat16, at SIZES[0] and at DECODE: what is wanted, and what no kernel
# can beat at 4.3 TB/s and 790 TFLOP/s.
GOALS: dict[tuple[str, str, Size], tuple[float, float]] = {
    ("additive_scalar", "forward", SIZES[0]): (0.40, 0.125),
    ("additive_vector", "forward", SIZES[0]): (0.55, 0.156),
    ("delta_scalar", "forward", SIZES[0]): (0.45, 0.126),
    ("delta_scalar", "backward", SIZES[0]): (1.8, 0.30),
    ("delta_vector", "forward", SIZES[0]): (1.0, 0.19),
    ("delta_vector", "backward", SIZES[0]): (2.5, 0.34),
    **{
        (name, "forward", DECODE): (0.1, 0.062)
        for name in ("additive_scalar", "additive_vector", "delta_scalar", "delta_vector")
    },
}


@dataclass(frozen=True)
class Contestant:
    """One implementation of a subject.

    Attributes:
        run: takes the inputs by name, returns the output.
        package: what must be installed, or "".
        lay_out: brings the inputs into the layout that ``run`` takes, outside the clock.
    """

    run: Callable[..., Tensor]
    package: str = ""
    lay_out: Callable[[Inputs], Inputs] = dict


@dataclass(frozen=True)
class Subject:
    """One thing to time: how its inputs are drawn, and who competes."""

    draw: Callable[[Size, torch.device], Inputs]
    contestants: dict[str, Contestant]

    def present(self, dry: bool) -> dict[str, Contestant]:
        """Return those whose package is installed; without a GPU, ours and the reference."""
        wanted = ("triton", "reference") if dry else ("triton", "fla", "mamba_ssm", *WAYS)
        return {
            name: who
            for name, who in self.contestants.items()
            if name in wanted and (not who.package or importlib.util.find_spec(who.package))
        }


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _draw_form(form: Form, size: Size, device: torch.device) -> Inputs:
    batch, steps, heads, dim = size
    tokens = (batch, steps, heads)
    found = {name: _normal(*tokens, dim, device=device) for name in ("q", "k", "v")}
    if form.decay != "none":
        shape = {"fixed": (heads,), "vector": (*tokens, dim)}.get(form.decay, tokens)
        found["log_decay"] = -0.1 * torch.rand(shape, device=device)
    if form.value_decay:
        found["value_log_decay"] = -0.1 * torch.rand(*tokens, dim, device=device)
    if form.delta:
        found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
        found["beta"] = torch.rand(tokens, device=device, dtype=torch.bfloat16)
    if steps == 1:
        found["initial_state"] = torch.randn(batch, heads, dim, dim, device=device)
    return found


def _attention(backend: str) -> Callable[..., Tensor]:
    def run(**inputs: Any) -> Tensor:
        return linear_attention(**inputs, output_final_state=True, backend=backend)[0]

    return run


def _walking(walkers: int) -> Callable[..., Tensor]:
    """Return our forward pass as one walk from so many sequences and heads on."""

    def run(**inputs: Any) -> Tensor:
        from hybrid_kernels.triton.launch import walk_from

        with walk_from(walkers):
            return _attention("triton")(**inputs)

    return run


# Both ways of the forward pass (``launch.walks``); the default takes one of them.
WAYS = {"triton_walk": 0, "triton_steps": 1 << 30}


def _of_form(form: Form) -> Subject:
    contestants = {
        "triton": Contestant(_attention("triton")),
        "reference": Contestant(_attention("reference")),
    }
    if not form.value_decay:
        contestants["fla"] = Contestant(_attention("fla"), "fla")
        contestants |= {name: Contestant(_walking(count)) for name, count in WAYS.items()}
    return Subject(lambda size, device: _draw_form(form, size, device), contestants)


def _draw_ssd(size: Size, device: torch.device) -> Inputs:
    """Mamba-2: one group of B and C for all heads, N = the head's dim."""
    batch, steps, heads, dim = size
    return {
        "x": _normal(batch, steps, heads, dim, device=device),
        "dt": torch.empty(batch, steps, heads, device=device).uniform_(1e-3, 0.1),
        "A": -torch.arange(1.0, heads + 1, device=device),
        "B": _normal(batch, steps, 1, dim, device=device),
        "C": _normal(batch, steps, 1, dim, device=device),
    }


def _ssd(backend: str) -> Callable[..., Tensor]:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        v = (x * dt[..., None]).to(x.dtype)
        return linear_attention(C, B, v, log_decay=dt * A, scale=1.0, backend=backend)[0]

    return run


def _ssd_of_mamba(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=SSD_CHUNK)


def _draw_scan(size: Size, device: torch.device) -> Inputs:
    """Mamba-1 with D = H * dim channels."""
    batch, steps, heads, dim = size
    channels = heads * dim
    rates = torch.arange(1.0, MAMBA_STATES + 1, device=device)
    tokens = (batch, steps)
    return {
        "u": _normal(*tokens, channels, device=device),
        "delta": torch.empty(*tokens, channels, device=device).uniform_(1e-3, 0.1).bfloat16(),
        "A": -rates.expand(channels, -1).contiguous(),
        "B": _normal(*tokens, MAMBA_STATES, device=device),
        "C": _normal(*tokens, MAMBA_STATES, device=device),
        "D": torch.randn(channels, device=device),
    }


def _scan(backend: str) -> Callable[..., Tensor]:
    def run(**inputs: Any) -> Tensor:
        return selective_scan(**inputs, backend=backend)[0]

    return run


def _time_innermost(inputs: Inputs) -> Inputs:
    turned = {n: inputs[n].transpose(1, 2).contiguous() for n in ("u", "delta", "B", "C")}
    return {**inputs, **turned}


def _scan_of_mamba(**inputs: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
        selective_scan_fn,
    )

    return selective_scan_fn(**inputs)


SUBJECTS: dict[str, Subject] = {
    **{form.name: _of_form(form) for form in FORMS if not form.bonus and len({*form.heads}) == 1},
    "ssd": Subject(
        _draw_ssd,
        {
            "triton": Contestant(_ssd("triton")),
            "reference": Contestant(_ssd("reference")),
            "mamba_ssm": Contestant(_ssd_of_mamba, "mamba_ssm"),
        },
    ),
    "selective_scan": Subject(
        _draw_scan,
        {
            "triton": Contestant(_scan("triton")),
            "reference": Contestant(_scan("reference")),
            "mamba_ssm": Contestant(_scan_of_mamba, "mamba_ssm", _time_innermost),
        },
    ),
}
# What is timed unless other subjects are named.
BENCHED = (
    "additive_scalar",
    "additive_vector",
    "additive_outer",
    "delta",
    "delta_scalar",
    "delta_vector",
    "ssd",
    "selective_scan",
)


def call_of(who: Contestant, inputs: Inputs, direction: str) -> Callable[[], object]:
    """Return a call without arguments that does one of ``PASSES``."""
    inputs = who.lay_out(inputs)
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return who.run(**inputs)

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = list(leaves.values())
    o = who.run(**leaves)
    gradient = torch.randn_like(o)
    if direction == "backward":
        return lambda: torch.autograd.grad(o, wanted, gradient, retain_graph=True)
    return lambda: torch.autograd.grad(who.run(**leaves), wanted, gradient)


def milliseconds(
    runs: dict[str, list[Callable[[], object]]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median time of each contestant; they take turns, each on rotating inputs."""
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + WARM_UP * (device.type == "cuda")):
        for name, calls in runs.items():
            times[name].append(clock(calls[index % len(calls)]))
    return {name: statistics.median(found[-rounds:]) for name, found in times.items()}


def _on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def wall_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return what a call costs in a row of calls: the host's work where it is more than the device's."""
    times, calls = [], CALLS_IN_A_ROW if device.type == "cuda" else 1
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device) -> dict[str, float]:
    """Return what this device reaches now: copy bandwidth in GB/s and bf16 products in TFLOP/s."""
    words, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 12, 32)
    x = torch.randn(words, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs: dict[str, list[Callable[[], object]]] = {
        "copy": [lambda: y.copy_(x)],
        "product": [lambda: a @ b],
    }
    times = milliseconds(runs, 20, device)
    return {
        "copy_gb_per_s": 2 * x.numel() * 2 / times["copy"] / 1e6,
        "product_tflop_per_s": 2 * side**3 / times["product"] / 1e9,
    }


def traffic(inputs: Inputs, output: Tensor) -> int:
    """Return the bytes that any forward pass must move: each tensor once, a state both ways."""
    state = inputs.get("initial_state", output[:0])
    return sum(x.numel() * x.element_size() for x in (*inputs.values(), output, state))


def forward_flops(name: str, size: Size) -> float | None:
    """Return the operations of the matrix products of a chunked forward pass, None for a scan.

    Pairs of rows count once, the half above the diagonal included, as the matrix units do them.
    """
    batch, steps, heads, dim = size
    if name == "selective_scan":
        return None
    if steps == 1:
        return 2.0 * batch * heads * 2 * dim * dim
    products = 2 * CHUNK * dim + 2 * dim * dim
    if name.startswith("delta"):
        products += 2 * CHUNK * dim + CHUNK * CHUNK / 3 + dim * dim
    return 2.0 * batch * steps * heads * products


def sizes(device: torch.device) -> tuple[Size, ...]:
    """Return what is timed on a device, the sizes that have goals first."""
    return (SIZES[0], DECODE, *SIZES[1:]) if device.type == "cuda" else TINY


def bench(
    name: str, size: Size, device: torch.device, rounds: int, reached: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pass and contestant.

    Args:
        name: a key of ``SUBJECTS``.
        size: B, T, H and K = V.
        device: where.
        rounds: timed runs of each contestant.
        reached: what ``limits`` found, for the shares.
    """
    for row in _measure(name, size, device, rounds):
        if "gb_per_s" in row:
            row["share_of_copy"] = row["gb_per_s"] / reached["copy_gb_per_s"]
        if "tflop_per_s" in row:
            row["share_of_product"] = row["tflop_per_s"] / reached["product_tflop_per_s"]
        yield row


# Operations of a pass, in forward passes.
_PASS_FLOPS = {"forward": 1, "backward": 2, "forward+backward": 3}


def _measure(name: str, size: Size, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    subject = SUBJECTS[name]
    present = subject.present(dry=device.type != "cuda")
    sets = [subject.draw(size, device) for _ in range(ROTATED_INPUTS)]
    # The output is as large as the values, or as the first input of Mamba.
    bytes_moved = traffic(sets[0], sets[0].get("v", next(iter(sets[0].values()))))
    flops = forward_flops(name, size)
    for label in PASSES[:1] if size[1] == 1 else PASSES:
        runs: dict[str, list[Callable[[], object]]] = {}
        for who, contestant in present.items():
            if who in WAYS and (label != "forward" or size[1] == 1):
                continue
            try:
                calls = [call_of(contestant, x, label) for x in sets]
                calls[0]()
            except FAILURES as error:
                # One that cannot do this size is no reason to leave the others untimed.
                words = f"{type(error).__name__}: {error}"[:400]
                yield {"subject": name, "size": size, "pass": label, "backend": who, "error": words}
            else:
                runs[who] = calls
        for who, ms in milliseconds(runs, rounds, device).items():
            row = {"subject": name, "size": size, "pass": label, "backend": who, "ms": ms}
            row["wall_ms"] = wall_milliseconds(runs[who][0], device)
            goal = GOALS.get((name, label, size)) if who == "triton" else None
            row["goal_ms"], row["floor_ms"] = goal or (None, None)
            if label == "forward":
                row["gb_per_s"] = bytes_moved / ms / 1e6
            if flops is not None:
                row["tflop_per_s"] = _PASS_FLOPS[label] * flops / ms / 1e9
            yield row


def line(row: dict[str, Any]) -> str:
    """Return a row of ``bench`` as text, with the goal beside what was measured."""
    size = "x".join(str(n) for n in row["size"])
    text = f"{row['subject']:22} {size:16} {row['pass']:17} {row['backend']:10}"
    if "error" in row:
        return f"{text} FAILED {row['error']}"
    text += f"{row['ms']:9.3f} ms"
    if row["goal_ms"] is None:
        return text
    word = "met" if row["ms"] <= row["goal_ms"] else "MISSED"
    return f"{text}  goal {row['goal_ms']} (floor {row['floor_ms']}): {word}"
