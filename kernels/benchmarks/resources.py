"""Registers, shared memory and spills of every kernel, compiled without a device.

``python kernels/benchmarks/resources.py [--target sm_90 ...]`` prints a table and fails if a
kernel spills more than ``SPILL_BOUND`` bytes per thread. What is compiled is what the host code
launches: launches are recorded, without a second list of kernels.

For CUDA the figures are those of the assembled binary (cuobjdump, shipped with triton), for AMD
those that the compiler writes beside the code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.compiler
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from hybrid_kernels.arguments import CausalConv1d, LinearAttention, SelectiveScan
from hybrid_kernels.custom_ops import BackwardInputs
from hybrid_kernels.triton import convolution, decode, launch, linear, scan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may ask for.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# 36 of 255 registers, what the inverse of the delta rule in `pairs` comes near on sm_80 (136) and with
# triton 3.6 (128). More means that a block is too large or an array went to the stack.
SPILL_BOUND = 144
QUICK = (
    *("scalar additive 128 bfloat16", "outer additive", "vector delta 128"),
    *("no delta 128 bfloat16 forward", "conv1d", "selective_scan"),
)
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One distinct launch: a kernel, the types of its arguments, its compile-time constants."""

    kernel: Any
    config: launch.Config
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[int, ...]
    constants: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs.

    Attributes:
        kernel: its name.
        form: the calls that use it.
        registers: per thread.
        shared: bytes per program.
        spills: bytes per thread.
        warps: per program.
    """

    kernel: str
    form: str
    registers: int
    shared: int
    spills: int
    warps: int


def linear_calls(
    form: str, key_dim: int, value_dim: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return calls that launch all kernels of a form such as "scalar delta", to be recorded.

    The decay is "no", "scalar", "vector" (over keys), "value" (over values) or "outer" (over both).
    """
    batch, time, heads = 1, 128, 2
    tokens = (batch, time, heads)
    decay, rule = form.split()
    shapes = {"scalar": tokens, "vector": (*tokens, key_dim), "outer": (*tokens, key_dim)}
    g = torch.zeros(shapes[decay]) if decay in shapes else None
    value_g = torch.zeros(*tokens, value_dim) if decay in ("value", "outer") else None
    beta = torch.zeros(tokens) if rule == "delta" else None
    q, k = (torch.zeros(*tokens, key_dim, dtype=dtype) for _ in range(2))
    v = torch.zeros(*tokens, value_dim, dtype=dtype)
    state = torch.zeros(batch, heads, key_dim, value_dim)
    dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    chunk = launch.default_chunk(dot, rule == "delta", key_dim)
    width = launch.stored_dtype(q, k, v)
    parts = launch.inverse_parts(rule == "delta", g is not None, key_dim, width)
    inverse = torch.zeros(batch * time // chunk * heads, parts, chunk, chunk, dtype=width)
    inputs = LinearAttention(
        q, k, v, g, value_g, beta, initial_state=state, scale=1.0, chunk_size=chunk
    )
    tokens = {name: x for name, x in inputs.floating().items() if name != "initial_state"}
    one = inputs.replace(**{name: x[:, :1].contiguous() for name, x in tokens.items()})
    wanted = frozenset(inputs.floating())

    def forward(walkers: int) -> object:
        with launch.walk_from(walkers):
            return linear.forward(inputs, wanted)

    return {
        "forward": lambda: forward(0),
        "forward in steps": lambda: forward(1 << 30),
        "backward": lambda: linear.backward(inputs, BackwardInputs(wanted, v, state, inverse)),
        "decode": lambda: decode.step(one),
    }


def convolution_calls(channels: int, width: int) -> dict[str, Callable[[], object]]:
    """Return calls that launch the kernels of ``causal_conv1d`` in bfloat16, to be recorded."""
    x = torch.zeros(1, 128, channels, dtype=torch.bfloat16)
    weight, bias = torch.zeros(channels, width), torch.zeros(channels)
    state = torch.zeros(1, channels, width - 1)
    inputs = CausalConv1d(x, weight, bias, state, activation="silu")
    wanted = frozenset(inputs.floating())
    return {
        "forward": lambda: convolution.forward(inputs, wanted),
        "backward": lambda: convolution.backward(inputs, BackwardInputs(wanted, x)),
    }


def scan_calls(channels: int, states: int) -> dict[str, Callable[[], object]]:
    """Return calls that launch the kernels of ``selective_scan`` in bfloat16, to be recorded."""

    def bf16(*shape: int) -> Tensor:
        return torch.zeros(1, 128, *shape, dtype=torch.bfloat16)

    u, delta, b, c = bf16(channels), bf16(channels), bf16(states), bf16(states)
    a, state = torch.zeros(channels, states), torch.zeros(1, channels, states)
    inputs = SelectiveScan(u, delta, a, b, c, torch.zeros(channels), state)
    wanted, saved = frozenset(inputs.floating()), torch.zeros(128, channels, states)
    tokens = {"u": u, "delta": delta, "B": b, "C": c}
    one = inputs.replace(**{name: x[:, :1] for name, x in tokens.items()})
    return {
        "forward": lambda: scan.forward(inputs, wanted),
        "backward": lambda: scan.backward(inputs, BackwardInputs(wanted, u, state, saved)),
        "decode": lambda: scan.forward(one, frozenset()),
    }


def recorded(call: Callable[[], object], target: str) -> list[Launch]:
    """Return the launches of a call on a device of class ``target``, none of which is run."""
    found: list[Launch] = []

    def note(kernel: Any, config: launch.Config, arguments: tuple, constants: dict) -> None:
        names = kernel.arg_names
        signature, aligned = dict.fromkeys(names, "constexpr"), []
        for index, (name, x) in enumerate(zip(names, arguments, strict=False)):
            signature[name] = _type(x)
            fixed = isinstance(x, int) and name not in kernel.do_not_specialize
            if isinstance(x, Tensor) or (fixed and x % 16 == 0):
                aligned.append(index)
        assert set(constants) == set(names[len(arguments) :]), (kernel.__name__, names)
        found.append(
            Launch(
                kernel,
                config,
                tuple(signature.items()),
                tuple(aligned),
                tuple(sorted(constants.items(), key=lambda item: item[0])),
            )
        )

    with launch.record(target, note):
        call()
    return found


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        return _TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def compile_launch(found: Launch, form: str, target: str) -> Usage:
    """Compile one launch for a target and read what it needs."""
    source = triton.compiler.ASTSource(
        fn=found.kernel,
        signature=dict(found.signature),
        constexprs=dict(found.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in found.aligned},
    )
    options = found.config.options
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    name = found.kernel.__name__.removesuffix("_kernel")
    if TARGETS[target].backend == "hip":
        registers, spills = _amd(compiled.asm["amdgcn"])
    else:
        registers, spills = _nvidia(compiled.asm["cubin"])
    return Usage(name, form, registers, compiled.metadata.shared, spills, found.config.warps)


def _amd(text: str) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, f"the compiler wrote no {name}"
        return int(found.group(1))

    return field("vgpr_count"), 4 * field("vgpr_spill_count")


def _nvidia(binary: bytes) -> tuple[int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump wrote no resource usage: {text}"
    return int(found.group(1)), int(found.group(2))


def survey(calls: Iterable[tuple[str, Callable[[], object]]], target: str) -> list[Usage]:
    """Compile every distinct launch of the named calls once."""
    seen: dict[str, str] = {}
    table = []
    for form, call in calls:
        for found in recorded(call, target):
            key = repr((found.kernel.__name__, found.config, found.signature, found.constants))
            if key not in seen:
                seen[key] = form
                table.append(compile_launch(found, form, target))
    return table


def default_calls(quick: bool) -> list[tuple[str, Callable[[], object]]]:
    """Return the calls whose kernels the table shows: every form at the sizes models use.

    ``quick`` leaves the three forms in which every kernel occurs with each kind of decay, and the
    walk in two parts (``launch.fine``).
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    sizes = [
        ("scalar additive", 128, 128, bf16),
        ("vector additive", 128, 128, bf16),
        ("value additive", 128, 128, bf16),
        ("outer additive", 128, 128, bf16),
        ("no delta", 128, 128, bf16),
        ("scalar delta", 128, 128, bf16),
        ("vector delta", 128, 128, bf16),
        ("vector delta", 256, 256, bf16),
        ("vector delta", 64, 64, fp32),
        ("scalar additive", 128, 128, fp32),
        ("vector additive", 128, 128, fp32),
    ]
    calls = []
    for form, key_dim, value_dim, dtype in sizes:
        name = f"{form} {key_dim} {str(dtype).removeprefix('torch.')}"
        for part, call in linear_calls(form, key_dim, value_dim, dtype).items():
            calls.append((f"{name} {part}", call))
    for part, call in convolution_calls(768, 4).items():
        calls.append((f"conv1d 768 x 4 bfloat16 {part}", call))
    for part, call in scan_calls(4096, 16).items():
        calls.append((f"selective_scan 4096 x 16 bfloat16 {part}", call))
    return [found for found in calls if not quick or found[0].startswith(QUICK)]


def faults(table: list[Usage], target: str) -> list[str]:
    """Return a description of each broken bound."""
    found = []
    for row in table:
        if row.spills > SPILL_BOUND:
            found.append(f"{row.kernel} ({row.form}) spills {row.spills} bytes on {target}")
        if row.shared > SHARED_LIMIT[target]:
            found.append(f"{row.kernel} ({row.form}) needs {row.shared} bytes shared on {target}")
    return found


def show(table: list[Usage], target: str) -> str:
    """Return the table as text."""
    lines = [f"{target}: {'kernel':24} {'form':40} warps  registers  shared  spills"]
    for row in table:
        lines.append(
            f"{target}: {row.kernel:24} {row.form:40} {row.warps:5} {row.registers:10}"
            f" {row.shared:7} {row.spills:7}"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the table of each target; return 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="some forms instead of all")
    options = parser.parse_args()
    broken = []
    for target in options.target:
        table = survey(default_calls(options.quick), target)
        print(show(table, target), flush=True)
        broken += faults(table, target)
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
