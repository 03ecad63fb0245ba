"""RMSNorm's own backward pass: equal to the definition, and only where it pays."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hybrid.nn.norms import RMSNorm, ZeroCenteredRMSNorm, rms_norm

EPS = 1e-3


def defined(x: torch.Tensor, weight: torch.Tensor | None, eps: float = EPS) -> torch.Tensor:
    """The norm in operations that torch differentiates by itself."""
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x (*shape) and a weight, which want gradients."""
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=dtype), torch.rand(shape[-1], dtype=dtype) + 0.5
    return x.requires_grad_(), weight.requires_grad_()


def gradients(function, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor):
    """y, and what it gives back for dy."""
    y = function(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("weighted", [True, False])
def test_both_derivatives_are_those_of_the_definition(weighted):
    x, weight = inputs(2, 3, 5)
    given = (x, weight) if weighted else (x,)

    def norm(x, weight=None):
        return rms_norm(x, weight, EPS)

    torch.testing.assert_close(norm(*given), defined(x, weight if weighted else None))
    assert torch.autograd.gradcheck(norm, given)
    assert torch.autograd.gradgradcheck(norm, given)


@pytest.mark.parametrize("size", [1, 7, 64, 128])
def test_float32_is_as_exact_as_torch_has_it(size):
    x, weight = inputs(500, size)
    dy = torch.randn_like(x)
    true = gradients(defined, x, weight, dy)
    narrow = [y.detach().float().requires_grad_() for y in (x, weight)]
    ours = gradients(rms_norm, *narrow, dy.float())
    torchs = gradients(lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps), *narrow, dy.float())
    # the weight's gradient is a sum over rows one after the other, as of torch's LayerNorm
    steps = {"y": 2, "dx": 2, "dw": len(x) ** 0.5}
    for name, found, other, wanted in zip(steps, ours, torchs, true, strict=True):
        error, budget = (float((y - wanted).abs().max()) for y in (found, other))
        rounding = torch.finfo(torch.float32).eps * float(wanted.abs().max())
        assert error <= 2 * budget + steps[name] * rounding, name


@pytest.mark.parametrize("size", [1, 7, 64, 576])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_value_is_the_same_to_the_bit_without_a_gradient(size, weighted):
    x, weight = inputs(300, size, dtype=torch.float32)
    given = weight if weighted else None
    with torch.no_grad():
        alone = rms_norm(x, given, EPS)
    assert torch.equal(rms_norm(x, given, EPS), alone)


def test_a_row_does_not_depend_on_the_others():
    x, weight = inputs(3, 257, 96, dtype=torch.float32)
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y[1:2, 100:101], rms_norm(x[1:2, 100:101], weight, EPS))
    assert torch.equal(y[2], rms_norm(x[2], weight, EPS))


def test_only_the_input_and_a_number_per_row_are_kept():
    x, weight = inputs(64, 32, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        rms_norm(x, weight, EPS)
    assert sorted(y.numel() for y in kept) == [32, 64, 64 * 32]


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_frozen_has_no_gradient(frozen):
    x, weight = inputs(4, 6)
    (x if frozen == "input" else weight).requires_grad_(False)
    rms_norm(x, weight, EPS).square().sum().backward()
    learnt, ours = (weight, weight.grad) if frozen == "input" else (x, x.grad)
    (wanted,) = torch.autograd.grad(defined(x, weight).square().sum(), learnt)
    torch.testing.assert_close(ours, wanted)
    assert (x if frozen == "input" else weight).grad is None


@pytest.mark.parametrize("case", ["strided", "no rows", "one row", "zeros"])
def test_unusual_inputs(case):
    x, weight = inputs(2, 5, 24)
    part = {
        "strided": lambda x: x.split(8, dim=-1)[1],
        "no rows": lambda x: x[:, :0, :8],
        "one row": lambda x: x[0, 0, :8],
        "zeros": lambda x: 0 * x[..., :8],
    }[case]
    found, wanted = (
        torch.autograd.grad(norm(part(x), weight[:8], EPS).square().sum(), (x, weight))
        for norm in (rms_norm, defined)
    )
    torch.testing.assert_close(found, wanted)


def test_backward_within_autocast_is_float32():
    x, weight = inputs(8, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), (x, weight))
    wanted = torch.autograd.grad(defined(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(found, wanted)


def test_gradients_of_single_rows_by_vmap():
    x, weight = (y.detach() for y in inputs(5, 3, 8))

    def grads(norm):
        one = torch.func.grad(lambda w, x: norm(x, w, EPS).pow(3).sum())
        return torch.func.vmap(one, (None, 0))(weight, x)

    torch.testing.assert_close(grads(rms_norm), grads(defined))


def own(y: torch.Tensor) -> bool:
    """Whether the backward pass of y is ours."""
    names, nodes = [], [y.grad_fn]
    for node in nodes:
        if node is not None:
            names.append(node.name())
            nodes += [before for before, _ in node.next_functions]
    return any("RMSNorm" in name for name in names)


def test_where_it_is_used():
    x, weight = inputs(4, 16, dtype=torch.float32)
    assert own(rms_norm(x, weight, EPS))
    assert not own(rms_norm(x.bfloat16(), weight.bfloat16(), EPS))
    assert not own(rms_norm(x.detach(), weight.detach(), EPS))
    with torch.no_grad():
        assert rms_norm(x, weight, EPS).grad_fn is None
    for norm in (RMSNorm(16, eps=EPS), ZeroCenteredRMSNorm(16, EPS)):
        assert own(norm(x))
        found = norm(x.bfloat16())
        assert own(found)
        assert found.dtype == torch.bfloat16


def test_a_compiled_norm_has_no_graph_break():
    x, _ = inputs(4, 16, dtype=torch.float32)
    norm = RMSNorm(16, eps=EPS)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))
    found, wanted = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, norm))
    torch.testing.assert_close(found, wanted)
