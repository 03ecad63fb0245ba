"""Every backend of causal_conv1d against the reference and torch's own convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_kernels import causal_conv1d
from hybrid_kernels.testing import CONV_BACKENDS, TOLERANCE, assert_agrees, evaluate, relative_rms

PAIRS = [(name, dtype) for name, dtypes in CONV_BACKENDS.items() for dtype in dtypes]
backends = pytest.mark.parametrize("backend", CONV_BACKENDS)


def conv_inputs(
    batch=2, time=50, channels=6, width=4, bias=True, lengths=None, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, found = batch, {}
    if lengths is not None:
        batch, time, rows = 1, sum(lengths), len(lengths)
        found["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    found["x"] = normal(batch, time, channels)
    found["weight"] = normal(channels, width)
    found["initial_state"] = normal(rows, channels, width - 1)
    if bias:
        found["bias"] = normal(channels)
    return found


def compare(backend, dtype, activation, **sizes):
    inputs = conv_inputs(dtype=dtype, **sizes)
    options = {"activation": activation}
    expected = evaluate(causal_conv1d, inputs, dtype=torch.float64, backend="reference", **options)
    found = evaluate(causal_conv1d, inputs, backend=backend, **options)
    assert_agrees(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_agrees_with_the_reference(backend, dtype, activation):
    compare(backend, dtype, activation)


@backends
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_agrees_on_any_shape(backend, data):
    compare(
        backend,
        torch.float32,
        data.draw(st.sampled_from([None, "silu"])),
        batch=data.draw(st.integers(1, 3)),
        time=data.draw(st.integers(0, 40)),
        channels=data.draw(st.integers(1, 10)),
        width=data.draw(st.integers(1, 5)),
        bias=data.draw(st.booleans()),
        lengths=data.draw(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        seed=data.draw(st.integers(0, 1000)),
    )


@backends
def test_many_stretches(backend):
    compare(backend, torch.float32, "silu", batch=1, time=400, channels=768)


@backends
def test_equals_torch_conv1d(backend):
    """Independent of the reference: a depthwise convolution behind W - 1 zeros."""
    inputs = conv_inputs()
    del inputs["initial_state"]
    y = causal_conv1d(**inputs, backend=backend)[0]
    padded = torch.nn.functional.pad(inputs["x"].mT, (3, 0))
    other = torch.nn.functional.conv1d(
        padded, inputs["weight"][:, None], inputs["bias"], groups=inputs["weight"].shape[0]
    )
    assert relative_rms(y, other.mT) <= 1e-6


def test_gradcheck():
    inputs = {name: x.double() for name, x in conv_inputs(batch=1, time=9, channels=2).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def op(*values):
        named = dict(zip(inputs, values, strict=True))
        return causal_conv1d(**named, activation="silu", output_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(op, leaves)


@backends
def test_no_future(backend):
    inputs, other = conv_inputs(), conv_inputs(seed=1)
    before = causal_conv1d(**inputs, backend=backend)[0]
    x = inputs["x"].clone().requires_grad_()
    y = causal_conv1d(**{**inputs, "x": x}, activation="silu", backend=backend)[0]
    for t in (1, 20, 49):
        mixed = torch.cat([inputs["x"][:, :t], other["x"][:, t:]], dim=1)
        after = causal_conv1d(**{**inputs, "x": mixed}, backend=backend)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        (grad,) = torch.autograd.grad(y[:, :t].sum(), x, retain_graph=True)
        assert not grad[:, t:].any()


@backends
def test_any_split_is_one_pass(backend):
    inputs = conv_inputs()
    whole, whole_state = causal_conv1d(**inputs, output_final_state=True, backend=backend)
    state, parts, start = inputs["initial_state"], [], 0
    with torch.no_grad():
        for length in (1, 2, 0, 46, 1):
            part = {**inputs, "x": inputs["x"][:, start : start + length], "initial_state": state}
            y, state = causal_conv1d(**part, output_final_state=True, backend=backend)
            parts.append(y)
            start += length
    assert relative_rms(torch.cat(parts, 1), whole) <= 1e-6
    assert torch.equal(state, whole_state)


def test_compiles_without_a_graph_break():
    inputs = conv_inputs(lengths=[30, 10])
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    eager = evaluate(causal_conv1d, inputs, backend="torch")
    assert_agrees(evaluate(compiled, inputs, backend="torch"), eager, 0.0)
