"""Which implementation computes an op: one table, one rule of choice, no silent fallback.

A backend is a module with one function per op it implements. That function takes the op's arguments
(``arguments.py``), already validated, and returns ``(output, final_state)``. A backend that covers
only some inputs also has ``unsupported(arguments) -> str | None``: the reason why it cannot take
these, or None. A backend with a faster function for some inputs has
``prepare(arguments, overwrite_state) -> Callable | None``, which returns a function for inputs of
that form, or None.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hybrid_kernels.arguments import (
    Arguments,
    CausalConv1d,
    LinearAttention,
    SelectiveScan,
)
from hybrid_kernels.transforms import (
    any_autocast,
    refuse_transforms,
    transformed,
    without_autocast,
)
from hybrid_kernels.validation import check

F = TypeVar("F", bound=Callable)

logger = logging.getLogger("hybrid_kernels")

LINEAR_ATTENTION = LinearAttention.OP
SELECTIVE_SCAN = SelectiveScan.OP
CAUSAL_CONV1D = CausalConv1d.OP
OPS = (LINEAR_ATTENTION, SELECTIVE_SCAN, CAUSAL_CONV1D)


@dataclass(frozen=True)
class Backend:
    """One way to compute some of the ops.

    Attributes:
        name: value of ``backend=``.
        module: import path of the module that holds one function per op.
        ops: the ops it implements.
        requires: top-level packages that must be installed.
        pip: the command that installs them.
        gpu_only: whether it needs tensors on a GPU.
        automatic: whether ``backend=None`` may choose it.
        native: the arguments with a ``fold`` (``arguments.py``) that it takes.
    """

    name: str
    module: str
    ops: tuple[str, ...]
    requires: tuple[str, ...] = ()
    pip: str = ""
    gpu_only: bool = False
    automatic: bool = True
    native: tuple[str, ...] = ()


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
    Backend("torch", "hybrid_kernels.chunked", OPS, native=("write_scale",)),
    Backend("reference", "hybrid_kernels.reference", OPS, automatic=False, native=("write_scale",)),
    # Used by name only: they take fewer inputs, and are not tested on a GPU here.
    Backend("fla", _ADAPTERS, (LINEAR_ATTENTION,), ("fla",), _FLA, True, False),
    Backend("mamba_ssm", _ADAPTERS, (SELECTIVE_SCAN,), ("mamba_ssm",), _MAMBA, True, False),
    Backend("causal_conv1d", _ADAPTERS, (CAUSAL_CONV1D,), ("causal_conv1d",), _CONV, True, False),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}


_MISSING: dict[str, str | None] = {}


def _constant(function: F) -> F:
    """Mark a function whose result is a constant to a compiler that traces an op.

    As ``torch.compiler.assume_constant_result``, which imports the whole compiler (1.9 s).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Installed packages are constants.
@_constant
def _missing(name: str) -> str | None:
    """Return the first package that a backend requires and that is not installed, or None."""
    if name not in _MISSING:
        absent = (p for p in _BY_NAME[name].requires if importlib.util.find_spec(p) is None)
        _MISSING[name] = next(absent, None)
    return _MISSING[name]


# Functions of each loaded backend, by name. A compiler can trace a look-up, but not an import.
_FUNCTIONS: dict[str, dict[str, Callable]] = {backend.name: {} for backend in BACKENDS}


@_constant
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


# Form of inputs that have passed the checks -> the function that computes them. Both depend only on
# shapes, dtypes, devices and whether gradients are needed, so that a decode loop checks once.
_KNOWN: dict[tuple, Callable] = {}
_KNOWN_LIMIT = 4096


def resolve(arguments: Arguments, name: str | None, overwrite_state: bool = False) -> Callable:
    """Return the function that computes an op from its arguments, which have been checked.

    Args:
        arguments: of the op.
        name: of the backend, or None for the best one installed.
        overwrite_state: whether the function writes the final state into the initial state.

    Raises:
        ValueError: an argument is wrong, or the backend cannot take it (``choose``).
        ImportError: the backend needs a package that is not installed.
        TransformError: the inputs are under a transform that the backend does not support.
    """
    run = form = None
    if not torch.compiler.is_compiling():
        try:
            form = _form(arguments, name, overwrite_state)
            run = _KNOWN.get(form)
        except TypeError:
            # An argument cannot be hashed; the check raises the error.
            form = None
    if run is None:
        check(arguments)
        run = choose(arguments, name, overwrite_state)
        if form is not None:
            if len(_KNOWN) >= _KNOWN_LIMIT:
                _KNOWN.clear()
            _KNOWN[form] = run
    if name != "reference" and transformed():
        refuse_transforms(arguments)
    return without_autocast(run) if any_autocast() else run


def _form(arguments: Arguments, name: str | None, overwrite_state: bool) -> tuple:
    """Return everything that a check and a choice depend on; the value of a float is not."""
    grad = torch.is_grad_enabled()
    form: list = [arguments.OP, name, overwrite_state, grad]
    for x in type(arguments).get(arguments):
        if isinstance(x, Tensor):
            form += x.shape, x.dtype, x.device
            if grad:
                form.append(x.requires_grad)
        else:
            form.append(None if type(x) is float else x)
    return tuple(form)


def choose(arguments: Arguments, name: str | None, overwrite_state: bool = False) -> Callable:
    """Return the function that computes an op.

    Args:
        arguments: of the op, checked.
        name: of the backend, or None for the best one installed.
        overwrite_state: whether the function writes the final state into the initial state.

    Raises:
        ValueError: ``name`` is unknown, or that backend cannot take these inputs.
        ImportError: ``name`` needs a package that is not installed.
    """
    op, device = arguments.OP, arguments.first.device
    if overwrite_state:
        _check_overwriting(arguments)
    if name is not None:
        return _function(_by_name(name, device, arguments), arguments, overwrite_state)
    passed_over: list[str] = []
    for backend in BACKENDS:
        if op not in backend.ops or not backend.automatic:
            continue
        reason = _why_not(backend, device, arguments, automatic=True)
        if reason is None:
            _announce(op, backend.name, device.type, passed_over)
            return _function(backend, arguments, overwrite_state)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("the torch backend takes every input")


def _by_name(name: str, device: torch.device, arguments: Arguments) -> Backend:
    op = arguments.OP
    candidates = {b.name: b for b in BACKENDS if op in b.ops}
    backend = candidates.get(name)
    if backend is None:
        near = difflib.get_close_matches(str(name), candidates, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{op}.backend: expected one of {', '.join(candidates)}, got {name!r}{hint}"
        )
    package = _missing(backend.name)
    if package is not None:
        raise ImportError(
            f"{op}: backend {name!r} needs the package {package!r}, which is not installed. "
            f"Install it with `{backend.pip}`, or pass backend=None for the best one present."
        )
    reason = _why_not(backend, device, arguments, automatic=False)
    if reason is not None:
        raise ValueError(
            f"{op}: backend {name!r} cannot take this input: {reason}. "
            "Pass backend=None for the best one that can."
        )
    return backend


def _check_overwriting(arguments: Arguments) -> None:
    op, floating = arguments.OP, arguments.floating()
    if "initial_state" not in floating:
        raise ValueError(f"{op}: overwrite_state needs an initial_state to overwrite")
    wanting = [name for name, x in floating.items() if x.requires_grad]
    if torch.is_grad_enabled() and wanting:
        raise ValueError(
            f"{op}: overwrite_state cannot go with gradients, which need the initial state as it "
            f"was, and {wanting[0]} requires one; call it under torch.no_grad()"
        )


def _function(backend: Backend, arguments: Arguments, overwrite_state: bool) -> Callable:
    """Return the fastest function of a loaded backend for these inputs."""
    functions = _FUNCTIONS[backend.name]
    prepare, run = functions.get("prepare"), functions[arguments.OP]
    # A compiler traces the function itself and gains nothing from a prepared one.
    if prepare is not None and not torch.compiler.is_compiling():
        prepared = prepare(arguments, overwrite_state)
        if prepared is not None:
            return prepared
    if arguments.to_fold(backend.native):
        run = _folding(run, backend.native)
    return _overwriting(run) if overwrite_state else run


def _folding(run: Callable, native: tuple[str, ...]) -> Callable:
    def folding(arguments: Arguments):
        return run(arguments.fold(native))

    return folding


def _overwriting(run: Callable) -> Callable:
    def overwriting(arguments: Arguments):
        o, final_state = run(arguments)
        assert arguments.initial_state is not None
        return o, arguments.initial_state.copy_(final_state)

    return overwriting


def _why_not(
    backend: Backend, device: torch.device, arguments: Arguments, automatic: bool
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
    return None if unsupported is None else unsupported(arguments)


def _announce(op: str, name: str, device: str, passed_over: list[str]) -> None:
    key = (op, name, device)
    if torch.compiler.is_compiling() or key in _announced:
        return
    _announced.add(key)
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    logger.info("%s on %s: using the %r backend%s", op, device, name, because)
