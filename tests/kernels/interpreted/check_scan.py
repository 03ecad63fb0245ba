"""selective_scan in triton's interpreter against the reference in float64."""

import pytest
import torch

from hybrid_kernels import selective_scan
from hybrid_kernels.testing import (
    RATES,
    TOLERANCE,
    assert_agrees,
    evaluate,
    relative_rms,
    sample_scan,
)

TRITON = {"backend": "triton"}
SMALL = {"batch": 1, "time": 10, "channels": 5, "size": 3}


def compare(dtype=torch.float32, without=(), **sizes):
    inputs = sample_scan(dtype=dtype, **{**SMALL, **sizes})
    inputs = {name: x for name, x in inputs.items() if name not in without}
    expected = evaluate(selective_scan, inputs, dtype=torch.float64, backend="reference")
    assert_agrees(evaluate(selective_scan, inputs, **TRITON), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rate", RATES)
def test_agrees(rate):
    compare(rate=rate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_agrees_in_half_precision(dtype):
    compare(dtype)


@pytest.mark.parametrize("time", [0, 1, 2, 8, 9])
def test_any_length(time):
    compare(time=time, batch=2)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 9], [0, 3], [8, 8]])
def test_documents_do_not_see_each_other(lengths):
    compare(lengths=lengths)
    compare(lengths=lengths, without=("D", "initial_state"))


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (9, 17), (4, 40)])
def test_any_width(channels, size):
    compare(time=6, channels=channels, size=size)


@pytest.mark.parametrize("without", [("D",), ("initial_state",)], ids=str)
def test_without(without):
    compare(without=without)


def test_walls_beside_open_gates():
    inputs = sample_scan(**SMALL)
    inputs["A"][:, 0], inputs["A"][:, 1] = -1e30, -1e-6
    inputs["delta"][:, ::2] = 0.0
    expected = evaluate(selective_scan, inputs, dtype=torch.float64, backend="reference")
    assert_agrees(evaluate(selective_scan, inputs, **TRITON), expected, TOLERANCE[torch.float32])


def test_the_future_is_not_seen():
    inputs = sample_scan(**{**SMALL, "time": 18}, rate="strong")
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in ("u", "delta", "B", "C"):
        changed[name][:, 13:] *= 0.5
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, _ = selective_scan(**leaves, **TRITON)
    with torch.no_grad():
        assert torch.equal(selective_scan(**changed, **TRITON)[0][:, :13], y[:, :13])
    sequences = [leaves[name] for name in ("u", "delta", "B", "C")]
    for grad in torch.autograd.grad(y[:, :13].sum(), sequences):
        assert (grad[:, 13:] == 0).all()
        assert grad[:, :13].any()


def test_same_inputs_same_bits():
    inputs = sample_scan(**SMALL)
    first, second = (evaluate(selective_scan, inputs, **TRITON) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_one_pass_is_two():
    inputs = sample_scan(**SMALL)
    run = {**TRITON, "output_final_state": True}
    whole, last = selective_scan(**inputs, **run)
    state, parts = inputs.pop("initial_state"), []
    for part in (slice(0, 9), slice(9, 10)):
        names = ("u", "delta", "B", "C")
        cut = {name: x[:, part] if name in names else x for name, x in inputs.items()}
        y, state = selective_scan(**cut, initial_state=state, **run)
        parts.append(y)
    assert relative_rms(torch.cat(parts, 1), whole) <= 1e-6
    assert relative_rms(state, last) <= 1e-6


@pytest.mark.parametrize("lengths", [None, [4, 0, 3]])
def test_compiled_without_a_graph_break(lengths):
    inputs = sample_scan(**{**SMALL, "time": 7, "lengths": lengths})
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    eager = evaluate(selective_scan, inputs, **TRITON)
    assert_agrees(evaluate(compiled, inputs, **TRITON), eager, 1e-6)


def test_float64_is_refused():
    inputs = {name: x.double() for name, x in sample_scan(**SMALL).items()}
    with pytest.raises(ValueError, match="not in float64"):
        selective_scan(**inputs, **TRITON)
