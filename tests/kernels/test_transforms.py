"""The ops under autocast, and under differentiation other than ``backward()``."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from hybrid_kernels import causal_conv1d, linear_attention, selective_scan, split
from hybrid_kernels.testing import FORMS, evaluate, relative_rms, sample, sample_scan
from hybrid_kernels.transforms import TransformError

# PyTorch's own, on the first use of forward-mode AD.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

LOW = [torch.float16, torch.bfloat16]


def sample_conv(dtype=torch.float32, time=70):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, time, 6, generator=generator).to(dtype)
    return {"x": x, "weight": torch.randn(6, 4, generator=generator).to(dtype)}


OPS = {
    "linear_attention": (linear_attention, lambda time: sample(FORMS[2], time=time)),
    "delta_rule": (linear_attention, lambda time: sample(FORMS[12], time=time)),
    "selective_scan": (selective_scan, lambda time: sample_scan(time=time)),
    "causal_conv1d": (causal_conv1d, lambda time: sample_conv(time=time)),
}


def assert_same_under_autocast(op, inputs, autocast, **options):
    plain = evaluate(op, inputs, **options)
    with torch.autocast("cpu", autocast):
        found = evaluate(op, inputs, **options)
    for name, expected in plain.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_autocast_changes_nothing(form, backend, autocast):
    # The backward pass, too, is run inside the region.
    inputs = sample(form, time=40, gates="strong", dtype=autocast)
    assert_same_under_autocast(linear_attention, inputs, autocast, backend=backend)


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("lengths", [None, [30, 0, 10]])
def test_autocast_changes_nothing_in_the_other_ops(lengths, autocast):
    inputs = sample_scan(time=40, lengths=lengths, rate="strong")
    assert_same_under_autocast(selective_scan, inputs, autocast)
    assert_same_under_autocast(causal_conv1d, sample_conv(), autocast, activation="silu")


@pytest.mark.parametrize("autocast", LOW)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_autocast_changes_nothing_in_a_decode_step(form, autocast):
    inputs = sample(form, time=1, gates="strong", dtype=autocast)
    with torch.no_grad():
        plain = linear_attention(**inputs, output_final_state=True)
        with torch.autocast("cpu", autocast):
            found = linear_attention(**inputs, output_final_state=True)
    for got, expected in zip(found, plain, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", LOW)
def test_decays_of_fp16_range_under_autocast(dtype):
    inputs = sample(FORMS[2], time=256, gates="strong", dtype=dtype)
    expected = evaluate(linear_attention, inputs, dtype=torch.float64, backend="reference")
    with torch.autocast("cpu", dtype):
        found = evaluate(linear_attention, inputs)
    for name, right in expected.items():
        assert relative_rms(found[name], right) < 5e-3, name


def test_backward_inside_autocast_of_a_forward_outside():
    inputs = sample(FORMS[12], time=40)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    loss = linear_attention(**leaves)[0].square().sum()
    plain = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, list(leaves.values()))
    for got, expected in zip(found, plain, strict=True):
        assert torch.equal(got, expected)


def calls(name, time):
    op, draw = OPS[name]
    inputs = draw(time)
    first = next(iter(inputs))
    x = inputs.pop(first)
    return x, lambda x, backend: op(**{first: x}, **inputs, backend=backend)[0]


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused_but_by_the_reference(name, time):
    x, f = calls(name, time)
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        tangent = forward_ad.unpack_dual(f(dual, "reference")).tangent
        with pytest.raises(TransformError, match=r'forward-mode.*backend="reference"'):
            f(dual, None)
        # What carries no tangent is computed as ever.
        assert forward_ad.unpack_dual(f(x, None)).tangent is None
    _, found = torch.func.jvp(lambda x: f(x, "reference"), (x,), (direction,))
    torch.testing.assert_close(found, tangent)
    step = 1e-3
    numeric = (f(x + step * direction, "reference") - f(x - step * direction, "reference")) / step
    torch.testing.assert_close(tangent, numeric / 2, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.vmap(f)(torch.stack([x, x])),
        lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, x])),
        lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    ],
    ids=["jvp", "jacfwd", "jacrev", "vmap", "vmap_grad", "hessian"],
)
def test_functional_transforms_name_the_reference(name, time, transform):
    x, f = calls(name, time)
    with pytest.raises(TransformError, match=r'torch.func.*backend="reference"'):
        transform(lambda x: f(x, None), x)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_name_the_reference(name):
    x, f = calls(name, 20)
    x.requires_grad_()

    def second(backend):
        (grad,) = torch.autograd.grad(f(x, backend).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(grad.square().sum(), x)
        return found

    assert second("reference").isfinite().all()
    with pytest.raises(TransformError, match=r'second derivatives.*backend="reference"'):
        second(None)
    # A graph of the gradient that nobody differentiates is no fault.
    (grad,) = torch.autograd.grad(f(x, None).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(f(x, "reference").sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_batched_gradients_name_the_reference(name):
    x, f = calls(name, 20)
    x.requires_grad_()
    y = f(x, None)
    with pytest.raises(RuntimeError, match=r'vmap.*backend="reference"'):
        torch.autograd.grad(y, x, torch.stack([y, y]), is_grads_batched=True)


def test_a_compiled_forward_mode_is_refused():
    x, f = calls("linear_attention", 20)
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda x: f(x, None), (x,), (x,)), backend="eager"
    )
    with pytest.raises(Exception, match=r'backend="reference"'):
        compiled(x)


def test_split_under_transforms():
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def f(x):
        a, b = split(x, [2, 4])
        return (a.square().sum(-1) * b.prod(-1)).sum()

    def plain(x):
        a, b = x.split([2, 4], -1)
        return (a.square().sum(-1) * b.prod(-1)).sum()

    torch.testing.assert_close(
        torch.func.jvp(f, (x,), (x,))[1], torch.func.jvp(plain, (x,), (x,))[1]
    )
    torch.testing.assert_close(torch.func.hessian(f)(x), torch.func.hessian(plain)(x))
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
        torch.vmap(torch.func.grad(plain))(torch.stack([x, 2 * x])),
    )
    assert torch.autograd.gradgradcheck(f, (x.requires_grad_(),))
