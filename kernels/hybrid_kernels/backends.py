"""Which implementation computes an op: one table, one rule of choice, no silent fallback.

A backend is a module with one function per op it implements. That function takes the op's own
keyword arguments, already validated, and returns ``(output, final_state)``. A backend that covers
only some inputs also has ``unsupported(op, **arguments) -> str | None``: the reason why it cannot
take these, or None.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("hybrid_kernels")

LINEAR_ATTENTION = "linear_attention"
SELECTIVE_SCAN = "selective_scan"
CAUSAL_CONV1D = "causal_conv1d"
OPS = (LINEAR_ATTENTION, SELECTIVE_SCAN, CAUSAL_CONV1D)


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
    """

    name: str
    module: str
    ops: tuple[str, ...]
    requires: tuple[str, ...] = ()
    pip: str = ""
    gpu_only: bool = False
    automatic: bool = True

    def missing(self) -> str | None:
        """Return the first required package that is not installed, or None."""
        for package in self.requires:
            if importlib.util.find_spec(package) is None:
                return package
        return None

    def load(self) -> ModuleType:
        """Import the implementing module."""
        return importlib.import_module(self.module)


# In order of preference: `backend=None` takes the first one that is present and able.
BACKENDS: tuple[Backend, ...] = (
    Backend("torch", "hybrid_kernels.chunked", OPS),
    Backend("reference", "hybrid_kernels.reference", OPS),
)

_announced: set[tuple[str, str, str]] = set()


def available_backends(op: str) -> list[str]:
    """Return the names of the backends of ``op`` whose packages are installed."""
    return [b.name for b in BACKENDS if op in b.ops and b.missing() is None]


def choose(op: str, name: str | None, device: torch.device, arguments: dict[str, Any]) -> Callable:
    """Return the function that computes ``op``.

    Args:
        op: one of ``OPS``.
        name: the backend asked for, or None for the best one present.
        device: where the tensors are.
        arguments: the op's keyword arguments, for backends that take only some.

    Raises:
        ValueError: ``name`` is unknown, or that backend cannot take these inputs.
        ImportError: ``name`` needs a package that is not installed.
    """
    if name is not None:
        return _by_name(op, name, device, arguments)
    passed_over: list[str] = []
    for backend in BACKENDS:
        if op not in backend.ops or not backend.automatic:
            continue
        reason = _why_not(backend, op, device, arguments)
        if reason is None:
            _announce(op, backend.name, device.type, passed_over)
            return getattr(backend.load(), op)
        passed_over.append(f"{backend.name}: {reason}")
    raise AssertionError("the torch backend takes every input")


def _by_name(op: str, name: str, device: torch.device, arguments: dict[str, Any]) -> Callable:
    candidates = {b.name: b for b in BACKENDS if op in b.ops}
    backend = candidates.get(name)
    if backend is None:
        near = difflib.get_close_matches(str(name), candidates, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{op}: unknown backend {name!r}{hint} Known backends: {', '.join(candidates)}."
        )
    package = backend.missing()
    if package is not None:
        raise ImportError(
            f"{op}: backend {name!r} needs the package {package!r}, which is not installed. "
            f"Install it with `{backend.pip}`, or pass backend=None for the best one present."
        )
    reason = _why_not(backend, op, device, arguments)
    if reason is not None:
        raise ValueError(
            f"{op}: backend {name!r} cannot take this input: {reason}. "
            "Pass backend=None for the best one that can."
        )
    return getattr(backend.load(), op)


def _why_not(
    backend: Backend, op: str, device: torch.device, arguments: dict[str, Any]
) -> str | None:
    package = backend.missing()
    if package is not None:
        return f"{package} is not installed"
    if backend.gpu_only and device.type != "cuda":
        return f"it needs a GPU, the tensors are on {device.type!r}"
    unsupported = getattr(backend.load(), "unsupported", None)
    return unsupported(op, **arguments) if unsupported is not None else None


def _announce(op: str, name: str, device: str, passed_over: list[str]) -> None:
    key = (op, name, device)
    if torch.compiler.is_compiling() or key in _announced:
        return
    _announced.add(key)
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    logger.info("%s on %s: using the %r backend%s", op, device, name, because)
