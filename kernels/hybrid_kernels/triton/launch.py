"""How kernels are launched, and with which block sizes on which class of device.

Configurations are shipped, never searched for at run time, and depend on nothing but the device
class, the kernel, the form and the width of the operands: a new sequence length compiles nothing.
``python kernels/benchmarks/gpu_check.py tune`` is the opt-in search; its results go into this file.
They have not been tuned on a device yet: they are tiles that compile with next to no spills.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def default_chunk(dot: tl.dtype, delta: bool, key_dim: int) -> int:
    """Return the rows of a chunk: what still fits the registers in the widest kernel of a form."""
    return 64 if dot == tl.bfloat16 and not (delta and key_dim > 128) else 32


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel.

    Attributes:
        keys: rows of K (or channels) that a program holds.
        values: columns of V (or time steps) that a program holds.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    keys: int = 64
    values: int = 64
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Launch options; fused multiply-adds are requested since their default varies."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Kernel -> configuration with 16-bit operands, and with float32 ones. A name may be led by the form
# that needs other blocks: "wide_delta_" (K above 128), "fine_" (see ``fine``), "delta_vector_",
# "delta_", "value_" or "vector_", the first that is there counts.
_CUDA: dict[str, tuple[Config, Config]] = {
    "fused_chunk_forward": (Config(128, 32, 8, 1), Config(128, 16, 4, 1)),
    "states_forward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "states_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "delta_states_forward": (Config(256, 16, 4, 2), Config(256, 16, 8, 1)),
    "delta_states_backward": (Config(256, 16, 8, 1), Config(256, 16, 8, 1)),
    "value_states_forward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "value_states_backward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "outputs_forward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "value_outputs_forward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "values_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "keys_backward": (Config(32, 64, 8, 1), Config(32, 32, 4, 1)),
    "delta_keys_backward": (Config(32, 64, 8, 1), Config(16, 32, 4, 1)),
    "delta_vector_keys_backward": (Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    "value_keys_backward": (Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    "vector_keys_backward": (Config(32, 32, 8, 1), Config(16, 32, 4, 1)),
    "pairs": (Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    "pairs_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "decode": (Config(256, 32, 4, 1), Config(256, 32, 4, 1)),
    "convolution": (Config(64, 16, 4, 1), Config(64, 16, 4, 1)),
    "scan_forward": (Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    "scan_backward": (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


def _narrow(config: Config, kernel: str) -> tuple[Config, Config]:
    return config, _CUDA[kernel][1]


# Four times the shared memory of the least device, and products of whole groups of warps.
_HOPPER = {
    **_CUDA,
    "fused_chunk_forward": _narrow(Config(128, 32, 4, 2), "fused_chunk_forward"),
    "vector_fused_chunk_forward": _narrow(Config(128, 64, 4, 2), "fused_chunk_forward"),
    "delta_fused_chunk_forward": _narrow(Config(128, 64, 4, 2), "fused_chunk_forward"),
    "states_forward": _narrow(Config(64, 64, 4, 3), "states_forward"),
    "states_backward": _narrow(Config(64, 64, 4, 3), "states_backward"),
    "delta_states_forward": _narrow(Config(256, 64, 4, 2), "delta_states_forward"),
    "delta_states_backward": _narrow(Config(256, 64, 4, 2), "delta_states_backward"),
    "fine_fused_chunk_forward": _narrow(Config(128, 32, 4, 2), "fused_chunk_forward"),
    "fine_states_forward": _narrow(Config(256, 32, 4, 2), "delta_states_forward"),
    "fine_states_backward": _narrow(Config(256, 32, 4, 2), "delta_states_backward"),
    "wide_delta_states_forward": _CUDA["delta_states_forward"],
    "wide_delta_states_backward": _CUDA["delta_states_backward"],
    "outputs_forward": _narrow(Config(64, 128, 8, 2), "outputs_forward"),
    "values_backward": _narrow(Config(64, 128, 8, 2), "values_backward"),
    "keys_backward": _narrow(Config(64, 64, 8, 2), "keys_backward"),
    "delta_keys_backward": _narrow(Config(64, 64, 8, 2), "delta_keys_backward"),
    "delta_vector_pairs": _CUDA["pairs"],
    "delta_pairs": _narrow(Config(128, 64, 4, 1), "pairs"),
}
# In the interpreter a scan costs by the element, everything else by the call.
_INTERPRETER = {
    **dict.fromkeys(_CUDA, (Config(32, 32), Config(32, 32))),
    **dict.fromkeys(("scan_forward", "scan_backward"), (Config(4, 8), Config(4, 8))),
}
_TABLE: dict[str, dict[str, tuple[Config, Config]]] = {
    "sm_80": _CUDA,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": {
        **_CUDA,
        "fused_chunk_forward": _narrow(Config(128, 32, 4, 1), "fused_chunk_forward"),
    },
    "interpreter": _INTERPRETER,
}

# From how many pairs of a sequence and a head on the forward pass is one walk (``fused_chunks.py``):
# half as many as a large GPU has multiprocessors, two blocks of V each.
_WALKERS = {**dict.fromkeys(_TABLE, 64), "interpreter": 3}
WALK_KEYS = 128

_overrides: dict[str, Config] = {}
_walkers: int | None = None
_recorder: Callable[..., None] | None = None
_recorded_class: str | None = None


def device_class(device: torch.device) -> str:
    """Return the row of the table for a device: the nearest class that is not newer."""
    if _recorded_class is not None:
        return _recorded_class
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def operands(device: torch.device, *inputs: Tensor) -> tuple[tl.dtype, str]:
    """Return the dtype of the operands of matrix products, and their precision.

    16-bit floats of 5 exponent bits are multiplied as TF32, which has as many mantissa bits and
    the range of float32: a state may grow beyond 65504. The interpreter's bfloat16 products are
    wrong (triton 3.9), so it rounds to bfloat16 and multiplies in float32 (``blocks.product``).
    """
    kind = device_class(device)
    narrow = all(x.dtype == torch.bfloat16 for x in inputs)
    if kind == "interpreter":
        return tl.float32, "bf16" if narrow else "ieee"
    if narrow:
        return tl.bfloat16, "ieee"
    if kind.startswith("gfx"):
        return tl.float32, "ieee"
    narrow = (torch.bfloat16, torch.float16)
    return tl.float32, "tf32" if all(x.dtype in narrow for x in inputs) else "tf32x3"


def stored_dtype(*inputs: Tensor) -> torch.dtype:
    """Return the dtype of tensors between kernels: as precise as the operands of products."""
    narrow = all(x.dtype == torch.bfloat16 for x in inputs)
    return torch.bfloat16 if narrow else torch.float32


def fine(delta: bool, decays: bool, key_dim: int, width: torch.dtype, backward: bool) -> bool:
    """Whether the walk over time multiplies in two parts of ``width`` what it carries on.

    That is so in bfloat16 for the delta rule where its rounding adds up to 5e-3: nothing but other
    keys overwrites what rounding left in the state, with beta up to 2 not even they, and gates may
    all be open. At 128 keys the forward pass of a gated form stays below that without.
    """
    if not delta or width != torch.bfloat16:
        return False
    return backward or not decays or key_dim < 128


def inverse_parts(delta: bool, decays: bool, key_dim: int, width: torch.dtype) -> int:
    """Return in how many parts of ``width`` the inverse of the delta rule is kept."""
    return 1 + fine(delta, decays, key_dim, width, backward=False)


def exact(device: torch.device) -> str:
    """Return the precision for products that must keep float32's digits."""
    return "tf32x3" if device_class(device).startswith("sm") else "ieee"


def config(
    kernel: str,
    device: torch.device,
    dot: tl.dtype,
    forms: dict[str, bool] | None = None,
) -> Config:
    """Return the shipped configuration of a kernel, or what ``override`` put in its place."""
    if kernel in _overrides:
        return _overrides[kernel]
    table = _TABLE[device_class(device)]
    led = [f"{form}_{kernel}" for form, present in (forms or {}).items() if present]
    name = next((name for name in led if name in table), kernel)
    return table[name][0 if dot == tl.bfloat16 else 1]


def walks(device: torch.device, walkers: int, key_dim: int, precision: str) -> bool:
    """Whether ``walkers`` pairs of a sequence and a head are enough to walk over time at once.

    Depends on nothing that varies with the sequence length. K must fit one block, and operands in
    two parts of TF32 take twice the registers.
    """
    least = _WALKERS[device_class(device)] if _walkers is None else _walkers
    most = WALK_KEYS // 2 if precision == "tf32x3" else WALK_KEYS
    return walkers >= least and key_dim <= most


def block(size: int, limit: int) -> int:
    """Return the smallest power of two from 16 that holds ``size``, at most ``limit``."""
    return min(limit, max(16, 1 << (size - 1).bit_length()))


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *arguments: Any, **constants: Any):
    """Run a kernel on the device of its first tensor; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder(kernel, config, arguments, constants)
        return
    device = next(x for x in arguments if isinstance(x, Tensor)).device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, **constants, **config.options)


@contextlib.contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Use another configuration for one kernel: what the tuning sweep does."""
    global _overrides
    before, _overrides = _overrides, {**_overrides, kernel: config}
    try:
        yield
    finally:
        _overrides = before


@contextlib.contextmanager
def walk_from(walkers: int) -> Iterator[None]:
    """Walk from another number of sequences and heads on: 0 is always, a large one never."""
    global _walkers
    before, _walkers = _walkers, walkers
    try:
        yield
    finally:
        _walkers = before


@contextlib.contextmanager
def record(kind: str, recorder: Callable[..., None]) -> Iterator[None]:
    """Hand each launch to ``recorder`` instead of running it, as for a device of class ``kind``."""
    global _recorder, _recorded_class
    before = _recorder, _recorded_class
    _recorder, _recorded_class = recorder, kind
    try:
        yield
    finally:
        _recorder, _recorded_class = before
