"""Test inputs and error measures for backends: forms of the op, difficult inputs, tolerances.

A new form is covered by a row in ``FORMS``; a new backend by a row in ``BACKENDS_UNDER_TEST``.
Public, so that authors of other backends can test them against the reference.

Shapes: B batch, T time, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.api import linear_attention

# Relative RMS error that a backend may have against the reference in float64, by input dtype.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}

_ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Backend name -> the input dtypes it is tested in, for each op.
BACKENDS_UNDER_TEST: dict[str, tuple[torch.dtype, ...]] = {"torch": _ALL}
SCAN_BACKENDS: dict[str, tuple[torch.dtype, ...]] = {"torch": _ALL}
CONV_BACKENDS: dict[str, tuple[torch.dtype, ...]] = {"torch": _ALL}


@dataclass(frozen=True)
class Form:
    """One form of ``linear_attention``.

    Attributes:
        name: for test ids.
        decay: "none", "fixed", "scalar" or "vector".
        delta: whether beta is given.
        value_decay: whether the decay over values is given.
        bonus: whether the exclusive read is on.
        write_scale: whether writes are scaled.
        erase: whether erase keys and queries are given.
        heads: of q, k and v.
        paper: a mixer that has this form.
    """

    name: str
    decay: str = "none"
    delta: bool = False
    value_decay: bool = False
    bonus: bool = False
    write_scale: bool = False
    erase: bool = False
    heads: tuple[int, int, int] = (2, 2, 2)
    paper: str = ""


FORMS: tuple[Form, ...] = (
    Form("additive", paper="NormAttention 2210.10340"),
    Form("additive_fixed", "fixed", paper="Lightning 2401.04658"),
    Form("additive_scalar", "scalar", paper="Mamba-2 2405.21060"),
    Form("additive_vector", "vector", paper="GLA 2312.06635"),
    Form("additive_outer", "vector", value_decay=True, paper="DFW 2210.04243"),
    Form("additive_value", value_decay=True, paper="Griffin's diagonal 2402.19427"),
    Form("additive_scalar_value", "scalar", value_decay=True),
    Form("bonus", bonus=True),
    Form("bonus_scalar", "scalar", bonus=True),
    Form("bonus_vector", "vector", bonus=True, paper="RWKV-6 2404.05892"),
    Form("delta", delta=True, paper="DeltaNet 2406.06484"),
    Form("delta_fixed", "fixed", delta=True),
    Form("delta_scalar", "scalar", delta=True, paper="gated DeltaNet 2412.06464"),
    Form("delta_vector", "vector", delta=True, paper="Kimi Delta Attention 2510.26692"),
    Form("erase", erase=True),
    Form("erase_fixed", "fixed", erase=True),
    Form("erase_scalar", "scalar", erase=True, paper="Comba 2506.02475"),
    Form("erase_vector", "vector", erase=True, paper="RWKV-7 2503.14456"),
    Form("erase_grouped", "vector", erase=True, heads=(2, 4, 1)),
    Form("shared_keys", "scalar", heads=(1, 1, 4), paper="Mamba-2 with one group"),
    Form("grouped_keys", "scalar", heads=(2, 2, 4), paper="Mamba-2 with groups"),
    Form("grouped_values", "fixed", heads=(4, 2, 2), paper="grouped-query Lightning"),
    Form("grouped_delta", "scalar", delta=True, heads=(2, 2, 4), paper="Qwen3-Next"),
    Form("grouped_vector", "vector", heads=(4, 1, 2)),
    Form("scaled_keys", "scalar", write_scale=True, heads=(1, 1, 4), paper="Mamba-2's step size"),
    Form("scaled_outer", "vector", value_decay=True, write_scale=True, heads=(4, 2, 2)),
)


def _pick(values: Sequence[float]) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        choice = torch.randint(len(values), shape, generator=generator)
        return torch.tensor(values, dtype=torch.float64)[choice]

    return draw


def _alternating(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    along = min(1, len(shape) - 1)
    steps = torch.arange(shape[along]) % 2
    others = [1] * (len(shape) - along - 1)
    return (-20.0 * steps.double()).view(-1, *others).expand(shape)


def _uniform(rate: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return -rate * torch.rand(shape, generator=generator, dtype=torch.float64)

    return draw


# Log decays by name; all but the first two are difficult cases.
GATES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "mild": _uniform(0.1),
    "strong": _uniform(5.0),
    "open": _pick([0.0]),
    "nearly_open": _pick([-1e-6]),
    "closing": _pick([-20.0]),
    "alternating": _alternating,
    "closed": _pick([0.0, -1e-6, -20.0, -float("inf")]),
    "huge": _pick([0.0, -1e-2, -1e4, -1e6]),
}


def sample(
    form: Form,
    *,
    batch: int = 2,
    time: int = 70,
    key_dim: int = 8,
    value_dim: int = 5,
    gates: str = "mild",
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw the keyword arguments of ``linear_attention`` for a form.

    Args:
        form: which.
        batch: B, unless ``lengths`` is given.
        time: T, unless ``lengths`` is given.
        key_dim: K.
        value_dim: V.
        gates: a key of ``GATES``.
        lengths: of packed documents.
        dtype: what values are rounded to; log decays stay float32 at least.
        seed: of the draw.

    Returns:
        Tensors by argument name; ``initial_state`` always, ``cu_seqlens`` with ``lengths``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found: dict[str, Tensor] = {}
    rows = batch
    if lengths is not None:
        batch, time, rows = 1, sum(lengths), len(lengths)
        found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    heads, state_dtype = max(form.heads), torch.promote_types(dtype, torch.float32)
    found["q"] = normal(batch, time, form.heads[0], key_dim).to(dtype)
    keys = normal(batch, time, form.heads[1], key_dim)
    if form.delta:
        keys = torch.nn.functional.normalize(keys, dim=-1)
        strength = torch.rand(batch, time, heads, generator=generator, dtype=torch.float64)
        found["beta"] = (2 * strength).to(dtype)
    found["k"] = keys.to(dtype)
    found["v"] = normal(batch, time, form.heads[2], value_dim).to(dtype)
    if form.erase:
        # Transitions of norm at most 1 before the decay, as mixers keep them.
        shape = (batch, time, heads, key_dim)
        direction = torch.nn.functional.normalize(normal(*shape), dim=-1)
        strength = torch.rand(shape, generator=generator, dtype=torch.float64)
        found["erase_key"] = (-direction * strength).to(dtype)
        found["erase_query"] = direction.to(dtype)
    found["initial_state"] = normal(rows, heads, key_dim, value_dim).to(state_dtype)
    token = (batch, time, heads)
    shape = {"fixed": (heads,), "scalar": token, "vector": (*token, key_dim)}.get(form.decay)
    if shape is not None:
        found["log_decay"] = GATES[gates](shape, generator).to(state_dtype)
    if form.value_decay:
        found["value_log_decay"] = GATES[gates]((*token, value_dim), generator).to(state_dtype)
    if form.bonus:
        found["bonus"] = normal(heads, key_dim).to(dtype)
    if form.write_scale:
        found["write_scale"] = torch.rand(token, generator=generator, dtype=torch.float64).to(
            state_dtype
        )
    return found


# Sizes of A for ``sample_scan``, with step sizes up to 1; all but the first are difficult cases.
RATES = {"mild": 0.2, "strong": 20.0, "closed": 1e4, "open": 0.0}


def sample_scan(
    *,
    batch: int = 2,
    time: int = 70,
    channels: int = 6,
    size: int = 3,
    rate: str = "mild",
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw the keyword arguments of ``selective_scan``.

    Args:
        batch: B, unless ``lengths`` is given.
        time: T, unless ``lengths`` is given.
        channels: D.
        size: N.
        rate: a key of ``RATES``.
        lengths: of packed documents.
        dtype: what sequences are rounded to; A, D and the state stay float32 at least.
        seed: of the draw.

    Returns:
        Tensors by argument name, D and ``initial_state`` always, ``cu_seqlens`` with ``lengths``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, found = batch, {}
    if lengths is not None:
        batch, time, rows = 1, sum(lengths), len(lengths)
        found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    found["u"] = normal(batch, time, channels).to(dtype)
    state_dtype = torch.promote_types(dtype, torch.float32)
    found["delta"] = torch.rand(batch, time, channels, generator=generator).to(dtype)
    found["A"] = -RATES[rate] * torch.rand(channels, size, generator=generator).to(state_dtype)
    found["B"] = normal(batch, time, size).to(dtype)
    found["C"] = normal(batch, time, size).to(dtype)
    found["D"] = normal(channels).to(state_dtype)
    found["initial_state"] = normal(rows, channels, size).to(state_dtype)
    return found


def evaluate(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 1,
    **options,
) -> dict[str, Tensor]:
    """Run an op forward and backward on fixed output gradients.

    Args:
        op: one of the public ops.
        inputs: its tensors, by argument name.
        dtype: cast floating inputs to it first, or None.
        seed: of the output gradients, which depend on shapes only.
        options: further arguments of the op.

    Returns:
        "output", "final_state", and the gradient of each floating input under its own name, all
        in float64.
    """
    leaves = {}
    for name, x in inputs.items():
        if x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_()
        leaves[name] = x
    output, final_state = op(**leaves, output_final_state=True, **options)
    assert final_state is not None
    generator = torch.Generator().manual_seed(seed)
    loss = output.new_zeros((), dtype=torch.float64)
    for x in (output, final_state):
        # Rounded to what every dtype holds, so that autograd passes the same gradient to each.
        gradient = torch.randn(x.shape, generator=generator).bfloat16().double()
        loss = loss + (x.double() * gradient.to(x.device)).sum()
    floating = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(floating.values()), allow_unused=True)
    results = {"output": output.detach().double(), "final_state": final_state.detach().double()}
    for (name, x), grad in zip(floating.items(), found, strict=True):
        results[name] = torch.zeros_like(x).double() if grad is None else grad.double()
    return results


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference over that of ``expected``; NaN and inf propagate.

    A difference below the smallest normal float32 counts as 0. If the expected values are all zero,
    any greater difference returns inf.
    """
    difference = (found.double() - expected.double()).norm()
    size = expected.double().norm()
    if difference <= torch.finfo(torch.float32).tiny * max(1, found.numel()) ** 0.5:
        return 0.0
    return float(difference / size) if size > 0 else float("inf")


def assert_agrees(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Fail, naming the worst, unless all results agree to a relative RMS error."""
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative RMS error above {tolerance:g}: {wrong}"


def compare(
    form: Form, backend: str, dtype: torch.dtype, *, chunk_size: int | None = None, **sizes
) -> None:
    """Compare one backend with the reference in float64, on inputs rounded to ``dtype``.

    Args:
        form: which.
        backend: by name.
        dtype: of the inputs.
        chunk_size: passed to the backend.
        sizes: passed to ``sample``.
    """
    inputs = sample(form, dtype=dtype, **sizes)
    expected = evaluate(linear_attention, inputs, dtype=torch.float64, backend="reference")
    found = evaluate(linear_attention, inputs, backend=backend, chunk_size=chunk_size)
    assert_agrees(found, expected, TOLERANCE[dtype])
