"""Every form of linear_attention in triton's interpreter against the reference in float64."""

import pytest
import torch
import triton.language as tl

from hybrid_kernels import linear_attention
from hybrid_kernels.testing import FORMS as ALL_FORMS
from hybrid_kernels.testing import (
    TOLERANCE,
    assert_agrees,
    compare,
    evaluate,
    relative_rms,
    sample,
)
from hybrid_kernels.triton import launch

# The form that Triton refuses is tested last.
FORMS = [form for form in ALL_FORMS if not form.erase]
GROUPED = [form for form in FORMS if len(set(form.heads)) > 1]
PLAIN = [form for form in FORMS if form not in GROUPED]
SMALL = {"batch": 1, "time": 20, "key_dim": 20, "value_dim": 18, "chunk_size": 16}
NEVER = 1 << 30
named = {form.name: form for form in FORMS}


def by_name(form):
    return form.name


@pytest.mark.parametrize("form", PLAIN, ids=by_name)
def test_agrees(form):
    compare(form, "triton", torch.float32, **SMALL)


@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_agrees_with_hard_gates_and_packed_documents(form):
    compare(form, "triton", torch.float32, **SMALL, gates="closed", lengths=[6, 0, 1, 19])


def test_agrees_over_several_blocks():
    small = {**SMALL, "time": 39, "key_dim": 36, "value_dim": 33}
    for name in ("additive_scalar", "additive_outer", "delta_vector"):
        compare(named[name], "triton", torch.float32, **small)


@pytest.mark.parametrize("gates", ["closing", "alternating", "huge"])
@pytest.mark.parametrize("name", ["additive_scalar", "additive_outer", "delta_vector"])
def test_agrees_under_gates_that_hurt(name, gates):
    small = {**SMALL, "key_dim": 6, "value_dim": 5}
    compare(named[name], "triton", torch.float32, **small, gates=gates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["additive_scalar", "additive_outer", "delta_vector"])
def test_agrees_in_half_precision(name, dtype):
    compare(named[name], "triton", dtype, **{**SMALL, "time": 20, "batch": 2})


@pytest.mark.parametrize("gates", ["mild", "strong"])
@pytest.mark.parametrize(
    "name", ["additive_scalar", "additive_vector", "delta_scalar", "delta_vector"]
)
def test_error_of_bfloat16_as_devices_round(name, gates):
    """Operands of every product are rounded to bfloat16, and so is what is kept between kernels."""
    sizes = {"batch": 1, "time": 80, "key_dim": 64, "value_dim": 64, "chunk_size": 64}
    compare(named[name], "triton", torch.bfloat16, **sizes, gates=gates)


@pytest.mark.parametrize("walkers", [0, NEVER], ids=["walk", "steps"])
@pytest.mark.parametrize(
    ("name", "gates", "key_dim", "seed"),
    [
        ("delta", "mild", 64, 0),
        ("delta", "mild", 64, 1),
        ("delta", "mild", 128, 2),
        ("delta_scalar", "open", 64, 3),
        ("delta_vector", "nearly_open", 64, 4),
    ],
)
def test_error_of_bfloat16_where_nothing_forgets(name, gates, key_dim, seed, walkers):
    """With beta up to 2 what was rounded once stays in the state."""
    sizes = {"batch": 1, "time": 130, "key_dim": key_dim, "value_dim": 32}
    with launch.walk_from(walkers):
        compare(named[name], "triton", torch.bfloat16, **sizes, gates=gates, seed=seed)


@pytest.mark.parametrize("seed", [1, 6])
def test_error_of_bfloat16_in_a_decay_that_is_open(seed):
    """Its gradient rests on the product of two states, which may cancel."""
    sizes = {"batch": 1, "time": 130, "key_dim": 64, "value_dim": 64, "gates": "open"}
    compare(named["delta_scalar"], "triton", torch.bfloat16, **sizes, seed=seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["delta", "delta_scalar", "delta_vector"])
def test_error_of_bfloat16_with_more_tokens_than_keys(name, seed):
    sizes = {"batch": 1, "time": 40, "key_dim": 20, "value_dim": 18}
    compare(named[name], "triton", torch.bfloat16, **sizes, seed=seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gates", ["mild", "strong"])
@pytest.mark.parametrize("name", ["additive_fixed", "delta_fixed"])
def test_error_of_bfloat16_in_a_decay_per_head(name, gates, seed):
    """Its gradient is one sum over all tokens, and may be small against its terms."""
    sizes = {"batch": 1, "time": 70, "key_dim": 64, "value_dim": 20}
    compare(named[name], "triton", torch.bfloat16, **sizes, gates=gates, seed=seed)


@pytest.mark.parametrize(
    ("name", "key_dim", "learnt", "width"),
    [
        ("additive_fixed", 64, ("q", "log_decay"), torch.float32),
        ("additive_fixed", 64, ("q",), torch.bfloat16),
        ("additive_fixed", 64, (), torch.bfloat16),
        ("additive_scalar", 16, ("q", "log_decay"), torch.bfloat16),
        ("delta_scalar", 64, (), torch.bfloat16),
        ("delta_scalar", 63, (), torch.float32),
    ],
)
def test_only_what_needs_float32_is_multiplied_in_it(name, key_dim, learnt, width):
    sizes = {"batch": 1, "time": 20, "key_dim": key_dim, "value_dim": 16}
    inputs = sample(named[name], dtype=torch.bfloat16, **sizes)
    for given in learnt:
        inputs[given].requires_grad_()
    rows = set()
    with launch.record("sm_90", lambda kernel, config, arguments, _: rows.add(arguments[0].dtype)):
        o, _ = linear_attention(**inputs, backend="triton")
    assert rows == {width}
    assert o.dtype == torch.bfloat16


@pytest.mark.parametrize("gates", ["mild", "closed", "huge", "alternating"])
@pytest.mark.parametrize("name", ["additive", "additive_scalar", "additive_vector", "delta_scalar"])
def test_one_walk_is_states_and_outputs(name, gates):
    """The forward pass has two ways; which is taken depends on the number of sequences and heads."""
    inputs = sample(named[name], batch=1, time=37, key_dim=20, value_dim=18, gates=gates)
    ways = []
    for walkers in (0, NEVER):
        with torch.no_grad(), launch.walk_from(walkers):
            run = {"backend": "triton", "chunk_size": 16, "output_final_state": True}
            ways.append(linear_attention(**inputs, **run))
    for walk, steps in zip(*ways, strict=True):
        assert relative_rms(walk, steps) <= 1e-6


@pytest.mark.parametrize("name", ["additive_scalar", "additive_vector", "delta_scalar"])
def test_a_gate_that_is_not_a_number_shows(name):
    inputs = sample(named[name], batch=1, time=20, key_dim=16, value_dim=16)
    inputs["log_decay"][0, 3] = float("nan")
    with torch.no_grad():
        o, state = linear_attention(**inputs, backend="triton", output_final_state=True)
    assert o[0, 3:].isnan().all()
    assert state.isnan().all()


def test_heads_sequences_and_width_decide_the_way():
    """float32 operands, in two parts of TF32, leave no room for 128 keys."""
    taken = []
    with launch.record("sm_90", lambda kernel, *_: taken.append(kernel.__name__)):
        for heads, key_dim, dtype in (
            *((8, 128, torch.bfloat16), (7, 128, torch.bfloat16), (8, 144, torch.bfloat16)),
            *((8, 64, torch.float32), (8, 128, torch.float32), (8, 128, torch.float16)),
        ):
            tokens = torch.zeros(8, 64, heads, key_dim, dtype=dtype)
            with torch.no_grad():
                linear_attention(tokens, tokens, tokens, backend="triton")
    steps = ["states_forward_kernel", "outputs_forward_kernel"]
    walk = "fused_chunk_forward_kernel"
    assert taken == [walk, *steps, *steps, walk, *steps, walk]


def test_ways_and_blocks_nest():
    """What is decided inside another decision holds inside it only."""
    device, key_dim = torch.device("cpu"), 64
    shipped = launch.config("pairs", device, tl.bfloat16)
    first, second = launch.Config(warps=1), launch.Config(warps=2)
    with launch.walk_from(0), launch.override("pairs", first):
        with launch.walk_from(NEVER), launch.override("pairs", second):
            assert not launch.walks(device, 1, key_dim, "ieee")
            assert launch.config("pairs", device, tl.bfloat16) == second
        assert launch.walks(device, 1, key_dim, "ieee")
        assert launch.config("pairs", device, tl.bfloat16) == first
    assert not launch.walks(device, 1, key_dim, "ieee")
    assert launch.config("pairs", device, tl.bfloat16) == shipped


@pytest.mark.parametrize("time", [0, 1, 16])
@pytest.mark.parametrize("name", ["additive_value", "bonus_vector", "delta_scalar"])
def test_short_sequences(name, time):
    compare(named[name], "triton", torch.float32, **{**SMALL, "time": time})


@pytest.mark.parametrize("form", [f for f in FORMS if f not in GROUPED[1:]], ids=by_name)
def test_decode_step(form):
    inputs = sample(form, time=1, key_dim=20, value_dim=18)
    with torch.no_grad():
        found = linear_attention(**inputs, output_final_state=True, backend="triton")
        expected = linear_attention(
            **{name: x.double() for name, x in inputs.items()},
            output_final_state=True,
            backend="reference",
        )
    for x, y in zip(found, expected, strict=True):
        assert relative_rms(x, y) <= TOLERANCE[torch.float32]


def test_inverse_survives_near_equal_keys():
    # Where powers of the strict part grow to 1e8 and more, forward substitution does not notice.
    inputs = sample(named["delta"], batch=1, time=64, key_dim=4, value_dim=3)
    inputs["k"] = torch.ones_like(inputs["k"]) / 2 + 1e-3 * inputs["k"]
    inputs["beta"] = torch.ones_like(inputs["beta"])
    expected = evaluate(linear_attention, inputs, dtype=torch.float64, backend="reference")
    found = evaluate(linear_attention, inputs, backend="triton", chunk_size=64)
    assert_agrees(found, expected, 1e-4)


@pytest.mark.parametrize("name", ["additive_outer", "delta_scalar"])
def test_the_future_is_not_seen(name):
    inputs = sample(named[name], batch=1, time=37, gates="strong")
    changed = {key: x.clone() for key, x in inputs.items()}
    for key in ("q", "k", "v", "log_decay", "value_log_decay", "beta"):
        if key in changed:
            changed[key][:, 21:] *= 0.5
    run = {"backend": "triton", "chunk_size": 16}
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    o, _ = linear_attention(**leaves, **run)
    with torch.no_grad():
        assert torch.equal(linear_attention(**changed, **run)[0][:, :21], o[:, :21])
    names = ("k", "v", "log_decay", "value_log_decay")
    earlier = [leaves[name] for name in names if name in leaves]
    for x in torch.autograd.grad(o[:, :21].sum(), earlier):
        assert (x[:, 21:] == 0).all()
        assert x[:, :21].any()


def test_same_inputs_same_bits():
    inputs = sample(named["delta_vector"], batch=1, time=20)
    first, second = (
        evaluate(linear_attention, inputs, backend="triton", chunk_size=16) for _ in range(2)
    )
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_one_pass_is_two():
    inputs = sample(named["delta_vector"], batch=1, time=30)
    run = {"backend": "triton", "chunk_size": 16, "output_final_state": True}
    whole, last = linear_attention(**inputs, **run)
    state, parts = inputs.pop("initial_state"), []
    for part in (slice(0, 11), slice(11, 30)):
        cut = {name: x[:, part] for name, x in inputs.items()}
        o, state = linear_attention(**cut, initial_state=state, **run)
        parts.append(o)
    assert relative_rms(torch.cat(parts, 1), whole) <= 1e-6
    assert relative_rms(state, last) <= 1e-6


def test_compiled_without_a_graph_break():
    inputs = sample(named["additive_scalar"], batch=1, time=17)

    def loss(**tensors):
        return linear_attention(**tensors, backend="triton", chunk_size=16)[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (loss, compiled):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        grads.append(torch.autograd.grad(run(**leaves), list(leaves.values())))
    for x, y in zip(*grads, strict=True):
        assert relative_rms(x, y) <= 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 128}, "chunk_size is at most 64, got 128"),
        ({"q": torch.zeros(2, 70, 2, 8, dtype=torch.float64)}, "float64"),
    ],
)
def test_what_it_cannot_take_is_named(change, words):
    inputs = {**sample(named["additive"]), **change}
    with pytest.raises(ValueError, match=words):
        linear_attention(**inputs, backend="triton")


@pytest.mark.parametrize("offsets", [[0, 9, 5, 20], [0, 9, 19], [1, 20]])
def test_wrong_offsets_are_refused(offsets):
    inputs = sample(named["additive"], batch=1, time=20)
    inputs["cu_seqlens"] = torch.tensor(offsets)
    inputs["initial_state"] = inputs["initial_state"].expand(len(offsets) - 1, -1, -1, -1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_attention(**inputs, backend="triton")


FINITE_FORMS = [
    *("additive", "additive_scalar", "additive_vector", "additive_outer", "additive_value"),
    *("additive_scalar_value", "scaled_outer", "bonus_vector"),
    *("delta", "delta_scalar", "delta_vector"),
]
BAD = 21


def with_one_value(form, name, value, heads=2):
    """Inputs of 40 tokens, of which one entry of a head has the value; None if it has no such input."""
    inputs = sample(named[form], time=40, batch=heads // 2)
    if name not in inputs or inputs[name].dim() < 3:
        return None
    inputs[name][0, BAD, 0].view(-1)[-1] = value
    return inputs


# NumPy's, on products of what is not finite.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("form", FINITE_FORMS)
@pytest.mark.parametrize(
    "name", ["q", "k", "v", "log_decay", "value_log_decay", "beta", "write_scale"]
)
def test_gradients_of_a_loss_that_saw_no_nan_are_those_of_the_reference(form, name):
    """Of the tokens that the loss saw, where all of the reference's are finite; those of q always."""
    inputs, grads = with_one_value(form, name, torch.nan), {}
    if inputs is None:
        return
    for backend in ("reference", "triton"):
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        o, _ = linear_attention(**leaves, backend=backend)
        o[:, :BAD].square().sum().backward()
        grads[backend] = {
            key: x.grad[:, :BAD] for key, x in leaves.items() if x.dim() > 2 and x.shape[1] == 40
        }
    for key, right in grads["reference"].items():
        finite = right.isfinite().all(-1) if right.dim() == 4 else right.isfinite()
        found = grads["triton"][key]
        assert found[finite].isfinite().all(), key
        torch.testing.assert_close(found[finite], right[finite], rtol=1e-3, atol=1e-3)
    assert grads["triton"]["q"][0].isfinite().all()


# NumPy's, on products of what is not finite.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("heads", [2, 8], ids=["steps", "walk"])
@pytest.mark.parametrize("name", ["k", "v", "log_decay", "value_log_decay", "beta", "write_scale"])
@pytest.mark.parametrize("form", FINITE_FORMS)
def test_what_is_not_finite_reaches_no_earlier_token(form, name, heads):
    """In the fused pass, which many heads take, and in the other kernels."""
    for value in (torch.nan, torch.inf):
        if value == torch.inf and "decay" in name:
            continue  # not a decay
        inputs = with_one_value(form, name, value, heads)
        if inputs is None or (heads == 8 and ("value" in form or "outer" in form)):
            return  # no such input, or no fused pass
        with torch.no_grad():
            found, _ = linear_attention(**inputs, backend="triton")
            right, _ = linear_attention(**inputs, backend="reference")
        torch.testing.assert_close(found[0, :BAD], right[0, :BAD], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1:], right[1:], rtol=1e-4, atol=1e-4)
        assert not found[0, BAD + 1 :, 0].isfinite().all(-1).any()


def test_erase_keys_are_refused_by_name():
    form = next(form for form in ALL_FORMS if form.erase)
    with pytest.raises(
        ValueError, match="'triton' cannot take this input: it has no kernel for era"
    ):
        linear_attention(**sample(form), backend="triton")
