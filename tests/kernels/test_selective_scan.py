"""Every backend of selective_scan against the reference, and the invariants of the design."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_kernels import selective_scan
from hybrid_kernels.testing import (
    RATES,
    SCAN_BACKENDS,
    TOLERANCE,
    assert_agrees,
    evaluate,
    relative_rms,
    sample_scan,
)

PAIRS = [(name, dtype) for name, dtypes in SCAN_BACKENDS.items() for dtype in dtypes]
backends = pytest.mark.parametrize("backend", SCAN_BACKENDS)


def cut(inputs, start, stop):
    return {n: x[:, start:stop] if n in ("u", "delta", "B", "C") else x for n, x in inputs.items()}


def compare(backend, dtype, **sizes):
    inputs = sample_scan(dtype=dtype, **sizes)
    expected = evaluate(selective_scan, inputs, dtype=torch.float64, backend="reference")
    found = evaluate(selective_scan, inputs, backend=backend)
    assert_agrees(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("rate", RATES)
def test_agrees_with_the_reference(backend, dtype, rate):
    compare(backend, dtype, rate=rate)


@pytest.mark.parametrize("time", [0, 1, 40])
def test_an_empty_batch(time):
    compare("torch", torch.float32, batch=0, time=time)


def test_the_output_may_be_written_in_place():
    inputs = sample_scan(time=40)
    leaf = inputs["u"].requires_grad_()
    once = torch.autograd.grad(selective_scan(**inputs, backend="torch")[0].sum(), leaf)[0]
    y = selective_scan(**inputs, backend="torch")[0].mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], 2 * once)


@backends
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_agrees_on_any_shape(backend, data):
    compare(
        backend,
        torch.float32,
        batch=data.draw(st.integers(1, 3)),
        time=data.draw(st.integers(0, 60)),
        channels=data.draw(st.integers(1, 20)),
        size=data.draw(st.integers(1, 8)),
        rate=data.draw(st.sampled_from(sorted(RATES))),
        lengths=data.draw(st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=5)),
        seed=data.draw(st.integers(0, 1000)),
    )


@backends
@pytest.mark.parametrize("lengths", [None, [70, 0, 20, 1, 50]])
def test_many_segments(backend, lengths):
    compare(backend, torch.float32, batch=1, time=100, channels=256, size=64, lengths=lengths)


def test_gradcheck():
    inputs = {name: x.double() for name, x in sample_scan(batch=1, time=20, channels=2).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def op(*values):
        named = dict(zip(inputs, values, strict=True))
        return selective_scan(**named, output_final_state=True, backend="torch")

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@backends
@pytest.mark.parametrize("rate", ["mild", "closed"])
def test_no_future(backend, rate):
    inputs, other = sample_scan(rate=rate), sample_scan(rate=rate, seed=1)
    before = selective_scan(**inputs, backend=backend)[0]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = selective_scan(**leaves, backend=backend)[0]
    for t in (1, 16, 47):
        mixed = {
            name: torch.cat([x[:, :t], other[name][:, t:]], 1) if name in "u delta B C" else x
            for name, x in inputs.items()
        }
        assert torch.equal(selective_scan(**mixed, backend=backend)[0][:, :t], before[:, :t])
        sequence = [leaves[name] for name in ("u", "delta", "B", "C")]
        grads = torch.autograd.grad(output[:, :t].sum(), sequence, retain_graph=True)
        assert not any(grad[:, t:].any() for grad in grads)


@backends
def test_any_split_is_one_pass(backend):
    inputs = sample_scan(time=70)
    whole, whole_state = selective_scan(**inputs, output_final_state=True, backend=backend)
    state, parts, start = inputs["initial_state"], [], 0
    with torch.no_grad():
        for length in (1, 40, 0, 28, 1):
            part = {**cut(inputs, start, start + length), "initial_state": state}
            y, state = selective_scan(**part, output_final_state=True, backend=backend)
            parts.append(y)
            start += length
    assert relative_rms(torch.cat(parts, 1), whole) <= 1e-6
    assert relative_rms(state, whole_state) <= 1e-6


@backends
def test_packed_documents_are_each_alone(backend):
    lengths, start = [0, 40, 1, 30], 0
    inputs = sample_scan(lengths=lengths)
    packed, states = selective_scan(**inputs, output_final_state=True, backend=backend)
    for row, length in enumerate(lengths):
        alone = cut(inputs, start, start + length)
        alone["initial_state"] = inputs["initial_state"][row : row + 1]
        del alone["cu_seqlens"]
        y, state = selective_scan(**alone, output_final_state=True, backend=backend)
        assert torch.allclose(packed[:, start : start + length], y, atol=1e-6)
        assert torch.allclose(states[row], state[0], atol=1e-6)
        start += length


def test_compiles_without_a_graph_break():
    inputs = sample_scan(lengths=[30, 10])
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    eager = evaluate(selective_scan, inputs, backend="torch")
    assert_agrees(evaluate(compiled, inputs, backend="torch"), eager, 0.0)
