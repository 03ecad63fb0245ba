"""One token at a time: what a form prepares, and states that are overwritten."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hybrid_kernels import linear_attention, selective_scan
from hybrid_kernels.testing import (
    BACKENDS_UNDER_TEST,
    FORMS,
    SCAN_BACKENDS,
    TOLERANCE,
    relative_rms,
    sample,
    sample_scan,
)

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


@forms
@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
@pytest.mark.parametrize("time", [1, 20])
@torch.no_grad()
def test_a_state_that_is_overwritten(form, backend, time):
    inputs = sample(form, time=time, gates="strong")
    expected = linear_attention(**inputs, output_final_state=True, backend=backend)
    o, state = linear_attention(
        **inputs, output_final_state=True, backend=backend, overwrite_state=True
    )
    assert state is inputs["initial_state"]
    assert torch.equal(o, expected[0])
    assert torch.equal(state, expected[1])


@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 9]])
@pytest.mark.parametrize("time", [1, 20])
@torch.no_grad()
def test_a_state_that_the_scan_overwrites(backend, time, lengths):
    inputs = sample_scan(time=time, lengths=lengths)
    expected = selective_scan(**inputs, output_final_state=True, backend=backend)
    y, state = selective_scan(
        **inputs, output_final_state=True, backend=backend, overwrite_state=True
    )
    assert state is inputs["initial_state"]
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_state_that_lies_elsewhere(form, dtype):
    """Turned in memory, or in a dtype of its own: overwritten all the same."""
    inputs = sample(form, time=1, dtype=dtype)
    wide = {name: x.double() for name, x in inputs.items()}
    expected = linear_attention(**wide, output_final_state=True, backend="reference")
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    o, state = linear_attention(
        **inputs, output_final_state=True, backend="torch", overwrite_state=True
    )
    assert state is inputs["initial_state"]
    assert relative_rms(o, expected[0]) <= TOLERANCE[dtype]
    assert relative_rms(state, expected[1]) <= TOLERANCE[dtype]
    inputs["initial_state"] = inputs["initial_state"].half()
    o, state = linear_attention(
        **inputs, output_final_state=True, backend="torch", overwrite_state=True
    )
    assert state.dtype == torch.float16
    assert state is inputs["initial_state"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", SCAN_BACKENDS)
@torch.no_grad()
def test_a_state_of_another_dtype_that_the_scan_overwrites(backend, dtype):
    inputs = sample_scan(time=1)
    inputs["initial_state"] = inputs["initial_state"].to(dtype)
    expected = selective_scan(**inputs, output_final_state=True, backend=backend)
    y, state = selective_scan(
        **inputs, output_final_state=True, backend=backend, overwrite_state=True
    )
    assert state is inputs["initial_state"]
    assert state.dtype == dtype
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1].to(dtype))


@forms
@pytest.mark.parametrize("time", [1, 20])
@torch.no_grad()
def test_autocast_leaves_the_dtypes(form, time):
    inputs = sample(form, time=time)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention(**inputs, output_final_state=True, backend="torch")
    assert o.dtype == state.dtype == torch.float32


def test_what_was_prepared_without_gradients_does_not_serve_with_them():
    inputs = sample(FORMS[0], time=1)
    with torch.no_grad():
        plain = linear_attention(**inputs, backend="torch")[0]
    assert not linear_attention(**inputs, backend="torch")[0].requires_grad
    for name in ("q", "initial_state"):
        leaf = inputs[name].clone().requires_grad_()
        with torch.no_grad():
            linear_attention(**{**inputs, name: leaf}, backend="torch")
        o = linear_attention(**{**inputs, name: leaf}, backend="torch")[0]
        assert relative_rms(o.detach(), plain) <= 1e-6
        assert torch.autograd.grad(o.sum(), leaf)[0].any()


def test_a_state_can_be_overwritten_only_if_there_is_one_and_no_gradient():
    inputs = sample(FORMS[0], time=1)
    state = inputs.pop("initial_state")
    with pytest.raises(ValueError, match="overwrite_state needs an initial_state"):
        linear_attention(**inputs, overwrite_state=True)
    inputs["k"].requires_grad_()
    with pytest.raises(ValueError, match=r"k requires one; call it under torch.no_grad\(\)"):
        linear_attention(**inputs, initial_state=state, overwrite_state=True)
    with torch.no_grad():
        linear_attention(**inputs, initial_state=state, overwrite_state=True)


@torch.no_grad()
def test_a_compiled_step_overwrites_too():
    inputs = sample(FORMS[0], time=1)
    expected = linear_attention(**inputs, output_final_state=True, backend="torch")
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    o, state = compiled(**inputs, output_final_state=True, backend="torch", overwrite_state=True)
    assert relative_rms(o, expected[0]) <= 1e-6
    assert torch.equal(state, inputs["initial_state"])
    assert relative_rms(inputs["initial_state"], expected[1]) <= 1e-6


def allocated(call):
    """Bytes that the tensor operations of a call allocate, all together."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in found.events())


@forms
@torch.no_grad()
def test_a_step_allocates_rows_but_no_state(form):
    inputs = sample(form, batch=1, time=1, key_dim=64, value_dim=64)
    state = inputs["initial_state"].nbytes

    def step(overwrite_state):
        linear_attention(**inputs, backend="torch", overwrite_state=overwrite_state)

    assert allocated(lambda: step(True)) <= state / 8
    assert state <= allocated(lambda: step(False)) <= state * (1 + 1 / 8)
