"""How kernels are launched, and with which block sizes on which class of device.

Configurations are shipped, never searched for at run time, and depend on nothing but the device
class, the kernel and the width of the operands: a new sequence length compiles nothing.
``python -m hybrid_kernels.gpu_check tune`` is the opt-in search; what it finds is written here.
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
        """What triton takes: fused multiply-adds are asked for, their default is in motion."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Kernel -> configuration with 16-bit operands, and with float32 ones. A name may be led by the form
# that needs smaller blocks: "delta_", "value_" or "vector_", the first that is there counts.
_CUDA: dict[str, tuple[Config, Config]] = {
    "states_forward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "states_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "delta_states_forward": (Config(256, 16, 4, 2), Config(256, 16, 8, 1)),
    "delta_states_backward": (Config(256, 16, 8, 1), Config(256, 16, 8, 1)),
    "value_states_forward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "value_states_backward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "outputs_forward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "value_outputs_forward": (Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
    "values_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "keys_backward": (Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    "delta_keys_backward": (Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    "value_keys_backward": (Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    "pairs": (Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    "pairs_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "inverse": (Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
    "new_values": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "new_values_backward": (Config(64, 64, 4, 2), Config(32, 32, 4, 1)),
    "decode": (Config(256, 16, 4, 1), Config(256, 16, 4, 1)),
    "convolution": (Config(64, 16, 4, 1), Config(64, 16, 4, 1)),
    "scan_forward": (Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    "scan_backward": (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
# There a scan costs by the element, all else by the call.
_INTERPRETER = {
    **dict.fromkeys(_CUDA, (Config(32, 32), Config(32, 32))),
    **dict.fromkeys(("scan_forward", "scan_backward"), (Config(4, 8), Config(4, 8))),
}
_TABLE: dict[str, dict[str, tuple[Config, Config]]] = {
    "sm_80": {**_CUDA, "inverse": (Config(64, 64, 8, 1), Config(64, 64, 4, 1))},
    "sm_90": _CUDA,
    "sm_100": _CUDA,
    "gfx942": _CUDA,
    "interpreter": _INTERPRETER,
}

_overrides: dict[str, Config] = {}
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
    wrong (triton 3.9), so it multiplies in float32.
    """
    kind = device_class(device)
    if kind == "interpreter":
        return tl.float32, "ieee"
    if all(x.dtype == torch.bfloat16 for x in inputs):
        return tl.bfloat16, "tf32"
    if kind.startswith("gfx"):
        return tl.float32, "ieee"
    narrow = (torch.bfloat16, torch.float16)
    return tl.float32, "tf32" if all(x.dtype in narrow for x in inputs) else "tf32x3"


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
    _overrides[kernel] = config
    try:
        yield
    finally:
        del _overrides[kernel]


@contextlib.contextmanager
def record(kind: str, recorder: Callable[..., None]) -> Iterator[None]:
    """Hand each launch to ``recorder`` instead of running it, as for a device of class ``kind``."""
    global _recorder, _recorded_class
    _recorder, _recorded_class = recorder, kind
    try:
        yield
    finally:
        _recorder = _recorded_class = None
