"""NaN and inf stay where the recurrence sends them: never to earlier tokens or other documents.

The reference says where that is. A gradient counts too: a loss that never saw the bad token has
finite gradients wherever the reference has.
"""

import pytest
import torch

from hybrid_kernels import causal_conv1d, linear_attention, selective_scan
from hybrid_kernels.testing import FORMS, sample, sample_scan

TIME, BAD = 70, 41
FORM_NAMES = {form.name: form for form in FORMS}


def run(op, inputs, loss_on, backend, **options):
    """Return the output, the final state and the gradients of a loss on some of the tokens."""
    leaves = {
        name: x.clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    o, state = op(**leaves, output_final_state=True, backend=backend, **options)
    o[:, loss_on].square().sum().backward()
    grads = {name: x.grad for name, x in leaves.items() if x.requires_grad}
    return {"output": o.detach(), "state": state.detach(), **grads}


def assert_same_where_finite(found, expected, tolerance=1e-4):
    for name, right in expected.items():
        got, finite = found[name], torch.isfinite(right)
        assert torch.equal(torch.isfinite(got), finite), name
        torch.testing.assert_close(got[finite], right[finite], rtol=tolerance, atol=tolerance)


def check(op, inputs, name, value, loss_on, **options):
    inputs[name][0, BAD].view(-1)[-1] = value
    expected = run(op, inputs, loss_on, "reference", **options)
    found = run(op, inputs, loss_on, "torch", **options)
    assert_same_where_finite(found, expected)
    return found


@pytest.mark.parametrize(
    "name", ["q", "k", "v", "log_decay", "beta", "write_scale", "erase_key", "erase_query"]
)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_linear_attention_as_the_reference(form, name):
    inputs = sample(form, time=TIME)
    if name not in inputs or inputs[name].dim() == 1:
        return
    found = check(linear_attention, inputs, name, torch.nan, slice(0, BAD))
    assert found["output"][:, :BAD].isfinite().all()
    check(linear_attention, inputs, name, torch.nan, slice(BAD + 9, None))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("form", ["additive", "additive_vector", "delta_scalar", "bonus_vector"])
def test_earlier_tokens_stay_finite(form, name, value):
    inputs = sample(FORM_NAMES[form], time=TIME)
    found = check(linear_attention, inputs, name, value, slice(0, BAD))
    assert found["output"][:, :BAD].isfinite().all()
    assert not found["output"][0, BAD:].isfinite().all()
    assert found["q"][:, :BAD].isfinite().all()
    # The row beside it in the batch knows nothing of it.
    assert found["output"][1].isfinite().all()
    assert found["v"][1].isfinite().all()


def test_a_product_that_overflows_only_with_a_later_key():
    q, k, v = (torch.ones(1, 32, 1, 4) for _ in range(3))
    q *= 1e20
    k[0, 20], v[0, 20] = 1e25, 1e-30
    o, _ = linear_attention(q, k, v, backend="torch")
    expected, _ = linear_attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(o[:, :20].double(), expected[:, :20], rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["additive_scalar", "additive_outer", "delta_vector", "bonus"])
@pytest.mark.parametrize("bad", [10, 41])
def test_documents_know_nothing_of_each_other(form, bad):
    inputs = sample(FORM_NAMES[form], lengths=[30, 0, 25, 15])
    inputs["v"][0, bad] = torch.nan
    expected = run(linear_attention, inputs, slice(None), "reference")
    found = run(linear_attention, inputs, slice(None), "torch")
    assert_same_where_finite(found, expected)
    others = torch.ones(70, dtype=torch.bool)
    others[slice(0, 30) if bad < 30 else slice(30, 55)] = False
    for name in ("output", "q", "k", "v"):
        assert found[name][0, others].isfinite().all()


def test_gradients_that_are_not_finite_stay_with_their_tokens():
    inputs = sample(FORM_NAMES["additive_scalar"], time=TIME)
    grads = {}
    for backend in ("reference", "torch"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, _ = linear_attention(**leaves, backend=backend)
        do = torch.ones_like(o)
        do[0, BAD] = torch.nan
        o.backward(do)
        grads[backend] = {name: x.grad for name, x in leaves.items()}
    assert_same_where_finite(grads["torch"], grads["reference"])
    assert grads["torch"]["v"][0, BAD + 1 :].isfinite().all()
    assert grads["torch"]["q"][0, :BAD].isfinite().all()


def test_gradients_of_joint_rows():
    inputs = sample(FORM_NAMES["additive"], time=TIME, key_dim=8, value_dim=8)
    parts = {}
    for backend in ("reference", "torch"):
        rows = torch.cat([inputs[x].flatten(2) for x in "qkv"], dim=2)
        rows[0, BAD, -1] = torch.nan
        rows.requires_grad_()
        q, k, v = (x.unflatten(2, (2, 8)) for x in rows.split(16, dim=2))
        linear_attention(q, k, v, backend=backend)[0][:, :BAD].sum().backward()
        parts[backend] = {"rows": rows.grad}
    assert_same_where_finite(parts["torch"], parts["reference"])
    assert parts["torch"]["rows"][:, :BAD].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [30, 25, 15]])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_selective_scan_as_the_reference(name, lengths):
    inputs = sample_scan(time=TIME, lengths=lengths)
    found = check(selective_scan, inputs, name, torch.nan, slice(0, BAD))
    assert found["output"][:, :BAD].isfinite().all()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("lengths", [None, [30, 12, 28]])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_causal_conv1d(backend, lengths, activation):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, TIME, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    if lengths is not None:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    # The last token of the second document.
    inputs["x"][0, BAD] = torch.nan
    found = run(causal_conv1d, inputs, slice(0, BAD), backend, activation=activation)
    assert found["output"][:, :BAD].isfinite().all()
    assert found["output"][:, BAD + 4 :].isfinite().all()
    assert found["x"][:, :BAD].isfinite().all()
    if lengths is not None:
        assert found["output"][:, BAD + 1 :].isfinite().all()
        found = run(causal_conv1d, inputs, slice(BAD + 1, None), backend, activation=activation)
        assert found["x"][:, BAD + 1 :].isfinite().all()
        assert found["x"][:, :BAD].abs().max() == 0
