"""Every backend of linear_attention against the reference, and the invariants of the design."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_kernels import linear_attention
from hybrid_kernels.chunked import linear as chunked_linear
from hybrid_kernels.chunked import sizes as chunked_sizes
from hybrid_kernels.testing import (
    BACKENDS_UNDER_TEST,
    FORMS,
    GATES,
    TOLERANCE,
    assert_agrees,
    compare,
    evaluate,
    relative_rms,
    sample,
)

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
backends = pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
PAIRS = [(name, dtype) for name, dtypes in BACKENDS_UNDER_TEST.items() for dtype in dtypes]
SEQUENCE = (
    *("q", "k", "v", "log_decay", "value_log_decay", "beta", "write_scale"),
    *("erase_key", "erase_query"),
)


def cut(inputs, start, stop):
    """The inputs of a stretch of time; what has no time axis stays."""
    found = {}
    for name, x in inputs.items():
        along_time = name in SEQUENCE and x.dim() > 1
        found[name] = x[:, start:stop] if along_time else x
    return found


def small_gates(form):
    return list(GATES) if form.decay != "none" or form.value_decay else ["mild"]


@forms
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
def test_agrees_with_the_reference(form, backend, dtype):
    compare(form, backend, dtype)


@forms
@backends
def test_agrees_under_every_gate(form, backend):
    for gates in small_gates(form):
        compare(form, backend, torch.float32, time=37, gates=gates)


@forms
@backends
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_agrees_on_any_shape(form, backend, data):
    lengths = data.draw(
        st.none() | st.lists(st.integers(0, 80), min_size=1, max_size=5), label="lengths"
    )
    compare(
        form,
        backend,
        torch.float32,
        batch=data.draw(st.integers(1, 3), label="batch"),
        time=data.draw(st.integers(0, 150), label="time"),
        key_dim=data.draw(st.integers(1, 20), label="key_dim"),
        value_dim=data.draw(st.integers(1, 20), label="value_dim"),
        gates=data.draw(st.sampled_from(sorted(GATES)), label="gates"),
        lengths=lengths,
        seed=data.draw(st.integers(0, 1000), label="seed"),
        chunk_size=data.draw(st.sampled_from([None, 16, 64, 128]), label="chunk_size"),
    )


@forms
@pytest.mark.parametrize("lengths", [None, [70, 0, 1, 66]])
def test_many_segments(form, lengths, monkeypatch):
    """The chunked backend works segment by segment; here every one is as short as it gets."""
    monkeypatch.setattr(chunked_sizes, "SPAN_ROWS", 1)
    monkeypatch.setattr(chunked_sizes, "SPAN_ROWS_TRAINING", 1)
    for gates in ("mild", "closed"):
        compare(form, "torch", torch.float32, time=130, lengths=lengths, gates=gates)


def gradients(inputs, losses, **options):
    """The gradients, where there are any, of the output, of the final state or of both, squared."""
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    results = linear_attention(**leaves, output_final_state=True, **options)
    loss = sum(
        x.double().square().sum() for x, wanted in zip(results, losses, strict=True) if wanted
    )
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(x) if grad is None else grad).double()
        for (name, x), grad in zip(wanted.items(), found, strict=True)
    }


@forms
@pytest.mark.parametrize("lengths", [None, [100, 0, 1, 99]])
@pytest.mark.parametrize("losses", [(True, False), (False, True)], ids=["output", "final_state"])
@pytest.mark.parametrize("constant", [False, True], ids=["all", "constant_decay"])
def test_gradients_of_parts(form, lengths, losses, constant, monkeypatch):
    """Of the output or of the final state alone; with decays that ask for no gradient."""
    monkeypatch.setattr(chunked_sizes, "SPAN_ROWS_TRAINING", 256)
    inputs = sample(form, time=200, lengths=lengths)
    for name, x in inputs.items():
        x.requires_grad_(x.is_floating_point() and not (constant and "decay" in name))
    exact = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    expected = gradients(exact, losses, backend="reference")
    assert_agrees(gradients(inputs, losses, backend="torch"), expected, TOLERANCE[torch.float32])


@forms
def test_backward_twice(form):
    """What the forward pass keeps is still there after a backward pass."""
    inputs = {name: x.requires_grad_() for name, x in sample(form, time=200).items()}
    o = linear_attention(**inputs, backend="torch")[0]
    once, again = (
        torch.autograd.grad(o.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(once, again, strict=True))


@forms
@pytest.mark.parametrize("time", [0, 1, 40])
def test_an_empty_batch(form, time):
    compare(form, "torch", torch.float32, batch=0, time=time)


@pytest.mark.parametrize(("time", "lengths"), [(64, None), (40, None), (40, [30, 10])])
def test_the_output_may_be_written_in_place(time, lengths):
    inputs = sample(FORMS[0], batch=1, time=time, lengths=lengths)
    leaf = inputs["v"].requires_grad_()
    o = linear_attention(**inputs, backend="torch")[0]
    once = torch.autograd.grad(o.sum(), leaf)[0]
    o = linear_attention(**inputs, backend="torch")[0].mul_(2)
    assert torch.equal(torch.autograd.grad(o.sum(), leaf)[0], 2 * once)


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    inputs = sample(FORMS[0], time=200)
    expected = linear_attention(**inputs, backend="torch")[0]
    monkeypatch.setattr(chunked_linear, "Saved", None)
    assert torch.equal(linear_attention(**inputs, backend="torch")[0], expected)
    with torch.no_grad():
        asking = {name: x.requires_grad_() for name, x in inputs.items()}
        assert torch.equal(linear_attention(**asking, backend="torch")[0], expected)
    with pytest.raises(TypeError, match="NoneType"):
        linear_attention(**asking, backend="torch")


@backends
@pytest.mark.parametrize(("key_dim", "value_dim"), [(256, 32), (32, 256), (1, 1)])
@pytest.mark.parametrize("name", ["additive_vector", "delta_scalar"])
def test_large_and_unequal_dims(name, backend, key_dim, value_dim):
    form = next(form for form in FORMS if form.name == name)
    compare(form, backend, torch.float32, batch=1, key_dim=key_dim, value_dim=value_dim)


@forms
@pytest.mark.parametrize("gates", ["mild", "closing"])
def test_gradcheck(form, gates):
    inputs = sample(
        form, batch=1, time=18, key_dim=2, value_dim=2, gates=gates, dtype=torch.float64
    )
    leaves = [x.requires_grad_() for x in inputs.values()]

    def op(*values):
        named = dict(zip(inputs, values, strict=True))
        return linear_attention(**named, output_final_state=True, backend="torch", chunk_size=16)

    # The projection of fast mode sees every entry of the Jacobian.
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True, atol=1e-6)


@forms
@backends
@pytest.mark.parametrize("gates", ["mild", "closed"])
def test_no_future_in_the_output(form, backend, gates):
    """Whatever happens from token t on leaves what is before t as it was, bit for bit."""
    inputs = sample(form, time=90, gates=gates)
    before = linear_attention(**inputs, backend=backend)[0]
    for t in (1, 40, 64, 89):
        other = sample(form, time=90, gates=gates, seed=1)
        mixed = dict(inputs)
        for name in SEQUENCE:
            if name in inputs and inputs[name].dim() > 1:
                mixed[name] = torch.cat([inputs[name][:, :t], other[name][:, t:]], dim=1)
        after = linear_attention(**mixed, backend=backend)[0]
        assert torch.equal(before[:, :t], after[:, :t])


@forms
@backends
@pytest.mark.parametrize("gates", ["mild", "closed"])
def test_no_future_in_the_gradients(form, backend, gates):
    """An output's gradient is exactly zero for every later input."""
    inputs = sample(form, time=90, gates=gates)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    output = linear_attention(**leaves, backend=backend)[0]
    for t in (0, 40, 63):
        grads = torch.autograd.grad(
            output[:, : t + 1].sum(), list(leaves.values()), retain_graph=True
        )
        for name, grad in zip(leaves, grads, strict=True):
            if name in SEQUENCE and grad.dim() > 1:
                assert not grad[:, t + 1 :].any(), name


@backends
@pytest.mark.parametrize("name", ["additive_scalar", "additive_vector", "delta_vector"])
def test_a_later_gate_that_switches_the_way_moves_earlier_outputs_by_rounding_only(name, backend):
    form = next(form for form in FORMS if form.name == name)
    inputs = sample(form, time=128)
    before = linear_attention(**inputs, backend=backend)[0]
    closed = inputs["log_decay"].clone()
    closed[:, 100] = -float("inf")
    after = linear_attention(**{**inputs, "log_decay": closed}, backend=backend)[0]
    assert relative_rms(after[:, :100], before[:, :100]) <= 1e-6


@forms
@backends
@pytest.mark.parametrize("gates", ["mild", "closed"])
def test_any_split_is_one_pass(form, backend, gates):
    inputs = sample(form, time=130, gates=gates)
    whole, whole_state = linear_attention(**inputs, output_final_state=True, backend=backend)
    for splits in ([1, 129], [64, 66], [100, 0, 1, 1, 28]):
        parts, state, start = [], inputs["initial_state"], 0
        for length in splits:
            part = {**cut(inputs, start, start + length), "initial_state": state}
            with torch.no_grad():
                o, state = linear_attention(**part, output_final_state=True, backend=backend)
            parts.append(o)
            start += length
        assert relative_rms(torch.cat(parts, dim=1), whole) <= 1e-5
        assert relative_rms(state, whole_state) <= 1e-5


@forms
@backends
def test_packed_documents_are_each_alone(form, backend):
    lengths = [0, 70, 1, 33, 0]
    inputs = sample(form, lengths=lengths)
    packed = evaluate(linear_attention, inputs, backend=backend)
    start = 0
    for row, length in enumerate(lengths):
        alone = cut(inputs, start, start + length)
        alone["initial_state"] = inputs["initial_state"][row : row + 1]
        del alone["cu_seqlens"]
        leaves = {name: x.detach().requires_grad_() for name, x in alone.items()}
        o, state = linear_attention(**leaves, output_final_state=True, backend=backend)
        assert torch.allclose(packed["output"][:, start : start + length].float(), o, atol=1e-5)
        assert torch.allclose(packed["final_state"][row].float(), state[0], atol=1e-5)
        if length == 0:
            assert torch.equal(packed["final_state"][row].float(), inputs["initial_state"][row])
        start += length


@forms
@backends
@pytest.mark.parametrize("gates", ["mild", "strong"])
def test_chunk_size_and_batch_change_nothing(form, backend, gates):
    inputs = sample(form, batch=3, time=100, gates=gates)
    first = evaluate(linear_attention, inputs, backend=backend, chunk_size=16)
    for chunk_size in (32, 64, 128):
        other = evaluate(linear_attention, inputs, backend=backend, chunk_size=chunk_size)
        assert_agrees(other, first, 2 * TOLERANCE[torch.float32])
    row = {
        name: x[1:2] if name in (*SEQUENCE, "initial_state") and x.dim() > 1 else x
        for name, x in inputs.items()
    }
    alone = linear_attention(**row, backend=backend)[0]
    assert relative_rms(alone, first["output"][1:2]) <= 1e-5


@backends
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [32, 64])
def test_near_equal_keys(backend, beta, chunk_size):
    """A power series for the inverse loses every digit here; substitution does not."""
    torch.manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(1, 1, 1, 64), dim=-1)
    noise = 1e-3 * torch.randn(1, 256, 1, 64)
    k = torch.nn.functional.normalize(key + noise, dim=-1)
    inputs = {"q": torch.randn(1, 256, 1, 64), "k": k, "v": torch.randn(1, 256, 1, 64)}
    inputs["beta"] = torch.full((1, 256, 1), beta)
    inputs["initial_state"] = torch.zeros(1, 1, 64, 64)
    expected = evaluate(linear_attention, inputs, dtype=torch.float64, backend="reference")
    found = evaluate(linear_attention, inputs, backend=backend, chunk_size=chunk_size)
    tolerance = 1e-5
    if beta == 2:
        # Entries of the inverse reach 2, so each of a row's rounded products counts 4 times; the
        # step-by-step recurrence in float32 says what one rounding is worth here.
        plain = evaluate(linear_attention, inputs, backend="reference")
        one = max(relative_rms(plain[name], expected[name]) for name in expected)
        tolerance = 4 * chunk_size**0.5 * one
    assert_agrees(found, expected, tolerance)


@backends
@pytest.mark.parametrize("name", ["additive_fixed", "additive_vector", "delta_scalar"])
def test_a_long_run_does_not_drift(name, backend):
    form = next(form for form in FORMS if form.name == name)
    inputs = sample(form, batch=1, time=2**16, key_dim=4, value_dim=4)
    with torch.no_grad():
        o, state = linear_attention(**inputs, output_final_state=True, backend=backend)
        # The same in double precision and another chunk size, cut into pieces.
        wide = {name: x.double() for name, x in inputs.items()}
        pieces, after = [], wide["initial_state"]
        for start in range(0, 2**16, 2**14):
            part = {**cut(wide, start, start + 2**14), "initial_state": after}
            piece, after = linear_attention(
                **part, output_final_state=True, backend=backend, chunk_size=16
            )
            pieces.append(piece)
    assert relative_rms(o[:, -1024:], torch.cat(pieces, 1)[:, -1024:]) <= 1e-5
    assert relative_rms(state, after) <= 1e-5


@forms
@backends
def test_one_token_without_gradients(form, backend):
    """The decode step, and the state it was given stays as it was."""
    inputs = sample(form, time=1, gates="strong")
    state = inputs["initial_state"].clone()
    expected = linear_attention(**inputs, output_final_state=True, backend="reference")
    with torch.no_grad():
        found = linear_attention(**inputs, output_final_state=True, backend=backend)
    for x, y in zip(found, expected, strict=True):
        assert relative_rms(x, y) <= 1e-6
    assert torch.equal(inputs["initial_state"], state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["additive_scalar", "delta_vector", "bonus_vector"])
def test_compiles_without_a_graph_break(name, packed):
    form = next(form for form in FORMS if form.name == name)
    inputs = sample(form, time=40, lengths=[30, 10] if packed else None)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    eager = evaluate(linear_attention, inputs, backend="torch")
    assert_agrees(evaluate(compiled, inputs, backend="torch"), eager, 0.0)


@backends
def test_decays_of_keys_and_values_that_overflow_only_together(backend):
    """Both at -1.7 per token: exp(54) each over 32 tokens, and their product beyond float32."""
    form = next(form for form in FORMS if form.value_decay)
    inputs = sample(form, batch=1, time=100)
    for name in ("log_decay", "value_log_decay"):
        inputs[name] = torch.full_like(inputs[name], -1.7)
    expected = evaluate(linear_attention, inputs, backend="reference")
    assert_agrees(evaluate(linear_attention, inputs, backend=backend), expected, 1e-5)


SCALES = {
    "zeros": lambda x: x * (x > 0.5),
    "negative": lambda x: x - 0.5,
    "tiny": lambda x: x * 1e-30,
    "large": lambda x: x * 1e6,
}


@backends
@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("lengths", [None, [30, 0, 40]])
@pytest.mark.parametrize("name", ["scaled_keys", "scaled_outer"])
def test_any_scale_of_writes(name, lengths, scale, backend):
    form = next(form for form in FORMS if form.name == name)
    inputs = sample(form, lengths=lengths)
    inputs["write_scale"] = SCALES[scale](inputs["write_scale"])
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = evaluate(linear_attention, exact, backend="reference")
    found = evaluate(linear_attention, inputs, backend=backend)
    assert_agrees(found, expected, TOLERANCE[torch.float32])


@backends
@pytest.mark.parametrize(
    "form", [f for f in FORMS if not (f.delta or f.erase)], ids=lambda f: f.name
)
@pytest.mark.parametrize("gates", ["mild", "closed"])
def test_a_scale_of_writes_is_one_of_values(form, gates, backend):
    """Of every form, and where values have fewer heads than the state."""
    inputs = sample(form, gates=gates, dtype=torch.float64)
    heads = max(form.heads)
    scale = torch.rand(*inputs["q"].shape[:2], heads, dtype=torch.float64) + 0.1
    scale.requires_grad_()
    inputs.pop("write_scale", None)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    every_head = leaves["v"].repeat_interleave(heads // form.heads[2], dim=2)
    multiplied = leaves | {"v": every_head * scale.unsqueeze(-1)}
    wanted = [*leaves.values(), scale]
    found, expected = (
        torch.autograd.grad(linear_attention(**given, backend=backend)[0].square().sum(), wanted)
        for given in (leaves | {"write_scale": scale}, multiplied)
    )
    for x, y in zip(found, expected, strict=True):
        assert relative_rms(x, y) <= 1e-11


@backends
@pytest.mark.parametrize("gates", ["mild", "closed"])
@pytest.mark.parametrize("name", ["delta_scalar", "delta_vector"])
def test_the_delta_rule_as_erase_keys(name, gates, backend):
    """a = -beta k and b = k, with values beta v."""
    form = next(form for form in FORMS if form.name == name)
    inputs = sample(form, gates=gates, dtype=torch.float64)
    expected = evaluate(linear_attention, inputs, backend=backend)

    def by_erase_keys(q, k, v, beta, **rest):
        strength = beta.unsqueeze(-1)
        return linear_attention(
            q, k, strength * v, erase_key=-strength * k, erase_query=k, **rest, backend=backend
        )

    assert_agrees(evaluate(by_erase_keys, inputs), expected, 1e-11)
