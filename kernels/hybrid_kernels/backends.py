"""Which implementation computes an op: one table, one rule of choice, no silent fallback.

A backend is a module with one function per op it implements. That function takes the op's own
keyword arguments, already validated, and returns ``(output, final_state)``. A backend that covers
only some inputs also has ``unsupported(op, **arguments) -> str | None``: the reason why it cannot
take these, or None. One that has something quicker for some inputs has
``prepare(op, overwrite_state, **arguments) -> Callable | None``: a function for inputs of just that
form, which may be kept, or None.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.transforms import (
    any_autocast,
    refuse_transforms,
    transformed,
    without_autocast,
)

logger = logging.getLogger("hybrid_kernels")

LINEAR_ATTENTION = "linear_attention"
SELECTIVE_SCAN = "selective_scan"
CAUSAL_CONV1D = "causal_conv1d"
OPS = (LINEAR_ATTENTION, SELECTIVE_SCAN, CAUSAL_CONV1D)

# What the check of each op takes, in that order: first tensors, then what else there is.
INPUTS: dict[str, tuple[str, ...]] = {
    LINEAR_ATTENTION: (
        "q",
        "k",
        "v",
        "log_decay",
        "value_log_decay",
        "beta",
        "bonus",
        "write_scale",
        "initial_state",
        "cu_seqlens",
        "chunk_size",
    ),
    SELECTIVE_SCAN: ("u", "delta", "A", "B", "C", "D", "initial_state", "cu_seqlens"),
    CAUSAL_CONV1D: ("x", "weight", "bias", "initial_state", "cu_seqlens", "activation"),
}


@dataclass(frozen=True)
class Backend:
    """One way to compute some of the ops.

    Attributes:
        name: what a user writes as ``backend=...``.
        module: import path of the module that holds one function per op.
        ops: the ops it implements.
        requires: top-level packages that must be installed.
        pip: the command that installs them.
        gpu_only: whether it needs tensors on a GPU.
        automatic: whether ``backend=None`` may choose it.
        scales_writes: whether it takes ``write_scale``; for the others, values are multiplied by it.
    """

    name: str
    module: str
    ops: tuple[str, ...]
    requires: tuple[str, ...] = ()
    pip: str = ""
    gpu_only: bool = False
    automatic: bool = True
    scales_writes: bool = False


_ADAPTERS = "hybrid_kernels.adapters"
_FLA = "pip install flash-linear-attention"
_MAMBA = "pip install mamba-ssm"
_CONV = "pip install causal-conv1d"

# In order of preference: `backend=None` takes the first one that is present and able.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "triton",
        "hybrid_kernels.triton",
        OPS,
        requires=("triton",),
        pip="pip install triton",
        gpu_only=True,
    ),
    Backend("torch", "hybrid_kernels.chunked", OPS, scales_writes=True),
    Backend("reference", "hybrid_kernels.reference", OPS, automatic=False, scales_writes=True),
    # Never chosen on their own: they take fewer inputs, and are not tested on a GPU here.
    Backend("fla", _ADAPTERS, (LINEAR_ATTENTION,), ("fla",), _FLA, True, False),
    Backend("mamba_ssm", _ADAPTERS, (SELECTIVE_SCAN,), ("mamba_ssm",), _MAMBA, True, False),
    Backend("causal_conv1d", _ADAPTERS, (CAUSAL_CONV1D,), ("causal_conv1d",), _CONV, True, False),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}


_MISSING: dict[str, str | None] = {}


# A compiler that traces an op takes what is installed for a constant.
@torch.compiler.assume_constant_result
def _missing(name: str) -> str | None:
    """Return the first package that a backend requires and that is not installed, or None."""
    if name not in _MISSING:
        absent = (p for p in _BY_NAME[name].requires if importlib.util.find_spec(p) is None)
        _MISSING[name] = next(absent, None)
    return _MISSING[name]


# The functions of each backend that has been loaded, by name. A compiler can follow a look-up here,
# but not an import.
_FUNCTIONS: dict[str, dict[str, Callable]] = {backend.name: {} for backend in BACKENDS}


@torch.compiler.assume_constant_result
def _load(name: str) -> bool:
    """Import a backend that is installed."""
    if not _FUNCTIONS[name]:
        module = importlib.import_module(_BY_NAME[name].module)
        names = (*OPS, "unsupported", "prepare")
        found = {f: getattr(module, f) for f in names if hasattr(module, f)}
        _FUNCTIONS[name].update(found)
    return True


_announced: set[tuple[str, str, str]] = set()


def available_backends(op: str) -> list[str]:
    """Return the names of the backends of ``op`` whose packages are installed."""
    return [b.name for b in BACKENDS if op in b.ops and _missing(b.name) is None]


# What inputs of one form were found to be right, and which function computes them. Both depend on
# shapes, dtypes, devices and the want of a gradient only; a decode loop asks the same question at
# every token.
_KNOWN: dict[tuple, Callable] = {}
_KNOWN_LIMIT = 4096


def known(request: tuple, tensors: tuple[Tensor | None, ...]) -> Callable | None:
    """Return the function kept for inputs of this form, which were checked before, or None.

    Args:
        request: the op, the backend asked for, whether the final state is to be written where the
            initial state is, and those of the inputs that are no tensors.
        tensors: the other inputs, in the order of ``INPUTS``.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        return _KNOWN.get(_form(request, tensors))
    except (AttributeError, TypeError):
        # Some input is no tensor or cannot be hashed: the check will say.
        return None


def resolve(
    request: tuple, tensors: tuple[Tensor | None, ...], check: Callable[..., None]
) -> Callable:
    """Return the function that computes an op, once its inputs have been checked.

    Args:
        request: as in ``known``.
        tensors: as in ``known``.
        check: raises a ValueError if an input is wrong.

    Raises:
        ValueError: an input is wrong, or ``choose`` says so.
        ImportError: ``choose`` says so.
        TransformError: the inputs are under a transform that the backend does not support.
    """
    run = known(request, tensors)
    if run is None:
        run = checked(request, tensors, check)
    op, name, *_ = request
    if name != "reference" and transformed():
        refuse_transforms(op, tensors)
    return without_autocast(run) if any_autocast() else run


def _form(request: tuple, tensors: tuple[Tensor | None, ...]) -> tuple:
    """Return what a check and a choice may depend on."""
    grad = torch.is_grad_enabled()
    form: list = [request, grad]
    for x in tensors:
        if x is None:
            form.append(None)
        else:
            form += x.shape, x.dtype, x.device
            if grad:
                form.append(x.requires_grad)
    return tuple(form)


def checked(
    request: tuple, tensors: tuple[Tensor | None, ...], check: Callable[..., None]
) -> Callable:
    """Check inputs that are not ``known``; keep and return the function that computes the op.

    Args:
        request: as in ``known``.
        tensors: as in ``known``.
        check: raises a ValueError if an input is wrong.

    Raises:
        ValueError: an input is wrong, or ``choose`` says so.
        ImportError: ``choose`` says so.
    """
    op, name, overwrite_state, *others = request
    check(*tensors, *others)
    arguments = dict(zip(INPUTS[op], (*tensors, *others), strict=True))
    run = choose(op, name, arguments, overwrite_state)
    if not torch.compiler.is_compiling():
        if len(_KNOWN) >= _KNOWN_LIMIT:
            _KNOWN.clear()
        _KNOWN[_form(request, tensors)] = run
    return run


def choose(
    op: str, name: str | None, arguments: dict[str, Any], overwrite_state: bool = False
) -> Callable:
    """Return the function that computes ``op``.

    Args:
        op: one of ``OPS``.
        name: the backend asked for, or None for the best one present.
        arguments: the op's keyword arguments, the first of them a tensor.
        overwrite_state: the function is to write the final state where the initial state is.

    Raises:
        ValueError: ``name`` is unknown, or that backend cannot take these inputs.
        ImportError: ``name`` needs a package that is not installed.
    """
    device = next(iter(arguments.values())).device
    if overwrite_state:
        _check_overwriting(op, arguments)
    if name is not None:
        backend = _by_name(op, name, device, arguments)
        return _function(backend, op, arguments, overwrite_state)
    passed_over: list[str] = []
    for backend in BACKENDS:
        if op not in backend.ops or not backend.automatic:
            continue
        reason = _why_not(backend, op, device, arguments, automatic=True)
        if reason is None:
            _announce(op, backend.name, device.type, passed_over)
            return _function(backend, op, arguments, overwrite_state)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("the torch backend takes every input")


def _by_name(op: str, name: str, device: torch.device, arguments: dict[str, Any]) -> Backend:
    candidates = {b.name: b for b in BACKENDS if op in b.ops}
    backend = candidates.get(name)
    if backend is None:
        near = difflib.get_close_matches(str(name), candidates, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{op}: unknown backend {name!r}{hint} Known backends: {', '.join(candidates)}."
        )
    package = _missing(backend.name)
    if package is not None:
        raise ImportError(
            f"{op}: backend {name!r} needs the package {package!r}, which is not installed. "
            f"Install it with `{backend.pip}`, or pass backend=None for the best one present."
        )
    reason = _why_not(backend, op, device, arguments, automatic=False)
    if reason is not None:
        raise ValueError(
            f"{op}: backend {name!r} cannot take this input: {reason}. "
            "Pass backend=None for the best one that can."
        )
    return backend


def _check_overwriting(op: str, arguments: dict[str, Any]) -> None:
    if arguments["initial_state"] is None:
        raise ValueError(f"{op}: overwrite_state needs an initial_state to overwrite")
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    wanting = [name for name, x in tensors.items() if x.requires_grad]
    if torch.is_grad_enabled() and wanting:
        raise ValueError(
            f"{op}: overwrite_state cannot go with gradients, which need the initial state as it "
            f"was, and {wanting[0]} requires one; call it under torch.no_grad()"
        )


def _function(
    backend: Backend, op: str, arguments: dict[str, Any], overwrite_state: bool
) -> Callable:
    """Return what computes an op in a backend that has been loaded, quickest for these inputs."""
    functions = _FUNCTIONS[backend.name]
    prepare, run = functions.get("prepare"), functions[op]
    # A compiler traces the function itself: to it, nothing is gained by keeping another.
    if prepare is not None and not torch.compiler.is_compiling():
        prepared = prepare(op, overwrite_state, **arguments)
        if prepared is not None:
            return prepared
    if op == LINEAR_ATTENTION and not backend.scales_writes:
        run = _scaling(run)
    return _overwriting(run) if overwrite_state else run


def _scaling(run: Callable) -> Callable:
    def scaling(*, v: Tensor, write_scale: Tensor | None, **others: Any):
        return run(v=scaled_values(v, write_scale), **others)

    return scaling


def scaled_values(v: Tensor, write_scale: Tensor | None) -> Tensor:
    """Return v (B, T, H_v, V), or each of its heads for H / H_v, times write_scale (B, T, H)."""
    if write_scale is None:
        return v
    dtype, heads = v.dtype, write_scale.shape[2]
    if v.shape[2] != heads:
        v = v.repeat_interleave(heads // v.shape[2], dim=2)
    return (v * write_scale.unsqueeze(-1)).to(dtype)


def _overwriting(run: Callable) -> Callable:
    def overwriting(*, initial_state: Tensor, **others: Any):
        o, final_state = run(initial_state=initial_state, **others)
        return o, initial_state.copy_(final_state)

    return overwriting


def _why_not(
    backend: Backend,
    op: str,
    device: torch.device,
    arguments: dict[str, Any],
    automatic: bool,
) -> str | None:
    """Return why a backend cannot take an input; triton's interpreter runs only by name."""
    package = _missing(backend.name)
    if package is not None:
        return f"{package} is not installed"
    interpreted = backend.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend.gpu_only and device.type != "cuda" and (automatic or not interpreted):
        return f"it needs a GPU, the tensors are on {device.type!r}"
    _load(backend.name)
    unsupported = _FUNCTIONS[backend.name].get("unsupported")
    if unsupported is None:
        return None
    return unsupported(op, **{n: x for n, x in arguments.items() if n != "write_scale"})


def _announce(op: str, name: str, device: str, passed_over: list[str]) -> None:
    key = (op, name, device)
    if torch.compiler.is_compiling() or key in _announced:
        return
    _announced.add(key)
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    logger.info("%s on %s: using the %r backend%s", op, device, name, because)
