"""The adapters for mamba-ssm and causal-conv1d, run against doubles of those packages.

Neither installs without CUDA. A double has the signature of the package's own function, refuses
what the C++ behind it refuses (dtypes, layouts; mamba-ssm 2.2, causal-conv1d 1.5), and computes
with our reference. flash-linear-attention itself runs in the interpreter: interpreted/check_fla.py.
"""

import sys
import types

import pytest
import torch

from hybrid_kernels import adapters, reference
from hybrid_kernels.arguments import CausalConv1d, LinearAttention, SelectiveScan
from hybrid_kernels.testing import TOLERANCE, assert_agrees, evaluate

RECORDS = {record.OP: record for record in (LinearAttention, SelectiveScan, CausalConv1d)}
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """u, delta (batch, dim, time); A (dim, N); B, C (batch, N, time); D (dim,)."""
    assert u.dtype in NARROW
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert D is None or D.dtype == torch.float32
    assert z is None
    assert delta_bias is None
    assert not delta_softplus
    assert all(x.stride(-1) == 1 for x in (u, delta, B, C))
    rows = (x.transpose(1, 2) for x in (u, delta))
    columns = (x.transpose(1, 2) for x in (B, C))
    y, state = reference.selective_scan(SelectiveScan(*rows, A, *columns, D))
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """x (batch, dim, time); weight (dim, width); initial_states (batch, dim, width - 1)."""
    assert x.dtype in NARROW
    assert weight.dtype in NARROW
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert x.shape[1] % 8 == 0
    assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert 2 <= weight.shape[1] <= 4
    assert bias is None or bias.dtype == weight.dtype
    assert seq_idx is None
    assert not return_final_states
    assert final_states_out is None
    assert activation in (None, "silu", "swish")
    if initial_states is not None:
        assert initial_states.dtype == x.dtype
        assert initial_states.shape == (*x.shape[:2], weight.shape[1] - 1)
        assert initial_states.stride(1) == 1
    y, _ = reference.causal_conv1d(
        CausalConv1d(x.transpose(1, 2), weight, bias, initial_states, activation=activation)
    )
    return y.transpose(1, 2)


@pytest.fixture
def doubles(monkeypatch):
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    convolution = types.ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = causal_conv1d_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", convolution)


def adapted(op, **optional):
    """Return an op that takes tensors by name, and checks that the adapter takes them."""

    def run(output_final_state=True, **inputs):
        arguments = RECORDS[op](**{**optional, **inputs})
        assert adapters.unsupported(arguments) is None
        return getattr(adapters, op)(arguments)

    return run


def ours(op, **optional):
    def run(output_final_state=True, **inputs):
        return getattr(reference, op)(RECORDS[op](**{**optional, **inputs}))

    return run


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, NARROW[1::-1]])
def test_selective_scan(skip, dtypes):
    generator = torch.Generator().manual_seed(0)
    one, other = dtypes
    inputs = {
        "u": torch.randn(2, 9, 4, generator=generator).to(one),
        "delta": torch.rand(2, 9, 4, generator=generator).to(other),
        "A": -torch.rand(4, 3, generator=generator),
        "B": torch.randn(2, 9, 3, generator=generator).to(one),
        "C": torch.randn(2, 9, 3, generator=generator).to(one),
    }
    if skip:
        inputs["D"] = torch.randn(4, generator=generator).to(one)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    fixed = {"D": None, "initial_state": None, "cu_seqlens": None}
    y, state = adapted("selective_scan", **fixed)(**inputs)
    expected, last = reference.selective_scan(SelectiveScan(**{**fixed, **inputs}))
    assert y.dtype == inputs["u"].dtype
    assert torch.equal(y, expected)
    assert torch.equal(state, last)
    assert not state.requires_grad
    weights = torch.randn(y.shape, generator=generator)
    grads, wanted = (
        torch.autograd.grad((out.float() * weights).sum(), list(inputs.values()))
        for out in (y, expected)
    )
    for name, grad, right in zip(inputs, grads, wanted, strict=True):
        assert torch.equal(grad, right), name


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("time", [1, 2, 11])
@pytest.mark.parametrize("without", [(), ("bias",), ("initial_state",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_conv1d(activation, time, without, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, time, 8), "weight": (8, 4), "bias": (8,), "initial_state": (2, 8, 3)}
    inputs = {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if name not in without
    }
    # A state is what an earlier call returned, in the dtype of x.
    narrow = {name: inputs[name].to(dtype) for name in ("x", "initial_state") if name in inputs}
    inputs = {**inputs, **narrow}
    absent = {**dict.fromkeys(without), "activation": activation, "cu_seqlens": None}
    found = evaluate(adapted("causal_conv1d", **absent), inputs)
    assert_agrees(found, evaluate(ours("causal_conv1d", **absent), inputs), TOLERANCE[dtype])


def conv(**changes):
    found = {"x": torch.zeros(1, 4, 8), "weight": torch.zeros(8, 4), "bias": None}
    return {**found, "activation": None, "initial_state": None, "cu_seqlens": None, **changes}


def scan(**changes):
    sequences = {name: torch.zeros(1, 4, 2) for name in ("u", "delta", "B", "C")}
    found = {**sequences, "A": torch.zeros(2, 2), "D": None}
    return {**found, "initial_state": None, "cu_seqlens": None, **changes}


def attention(**changes):
    found = {name: torch.zeros(1, 4, 2, 8) for name in "qkv"}
    names = ("log_decay", "value_log_decay", "beta", "bonus", "initial_state", "cu_seqlens")
    return {**found, **dict.fromkeys((*names, "chunk_size")), **changes}


@pytest.mark.parametrize(
    ("op", "inputs", "words"),
    [
        ("causal_conv1d", conv(weight=torch.zeros(8, 5)), "2 to 4 wide, got 5"),
        ("causal_conv1d", conv(weight=torch.zeros(6, 4)), "multiple of 8, got 6"),
        ("causal_conv1d", conv(cu_seqlens=torch.tensor([0, 4])), "packed documents"),
        ("causal_conv1d", conv(x=torch.zeros(1, 0, 8)), "empty sequence"),
        ("causal_conv1d", conv(x=torch.zeros(1, 4, 8).double()), "float64"),
        ("selective_scan", scan(cu_seqlens=torch.tensor([0, 4])), "packed documents"),
        ("selective_scan", scan(initial_state=torch.zeros(1, 2, 2)), "initial state"),
        ("selective_scan", scan(u=torch.zeros(1, 0, 2)), "empty sequence"),
        ("linear_attention", attention(q=torch.zeros(1, 0, 2, 8)), "empty sequence"),
        ("linear_attention", attention(v=torch.zeros(1, 4, 2, 8).half()), "one dtype"),
        ("linear_attention", attention(beta=torch.zeros(1, 4, 2)), "does not take float32"),
        ("linear_attention", attention(value_log_decay=torch.zeros(1, 4, 2, 8)), "decay over val"),
        ("linear_attention", attention(bonus=torch.zeros(2, 8)), "bonus"),
        ("linear_attention", attention(chunk_size=32), "chunk size"),
    ],
)
def test_what_an_adapter_cannot_take_is_named(op, inputs, words):
    assert words in adapters.unsupported(RECORDS[op](**inputs))
