"""Ops made from a record: an argument is declared once, and gradients travel by name."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

import hybrid_kernels.chunked  # noqa: F401, registers the ops
from hybrid_kernels.arguments import (
    Arguments,
    CausalConv1d,
    LinearAttention,
    SelectiveScan,
    optional,
    record,
)
from hybrid_kernels.custom_ops import custom_op

RECORDS = (LinearAttention, SelectiveScan, CausalConv1d)
OPS = [
    ("chunked_linear_attention", LinearAttention),
    ("chunked_selective_scan", SelectiveScan),
    ("chunked_conv1d", CausalConv1d),
]


@record
class Product(Arguments):
    """y = factor * x * weight * gate, with a gate that is optional."""

    OP: ClassVar[str] = "product"

    x: Tensor
    weight: Tensor
    gate: Tensor | None = optional("(B, T, D)")
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    factor: float = 1.0


@pytest.fixture(scope="module")
def product():
    """The op, and the names of the gradients that each backward pass was asked for."""
    asked = []

    def forward(a, wanted):
        y = a.factor * a.x * a.weight
        return y if a.gate is None else y * a.gate

    def backward(a, given):
        asked.append(given.wanted)
        gate = torch.ones_like(a.x) if a.gate is None else a.gate
        dy = given.grad_output * a.factor
        return Product.Gradients(
            gate=dy * a.x * a.weight, weight=dy * a.x * gate, x=dy * a.weight * gate
        )

    def fake(a, wanted):
        return torch.empty_like(a.x)

    return custom_op("test_product", Product, forward, backward, fake, results="Tensor"), asked


@pytest.mark.parametrize("wanted", [("x",), ("gate",), ("x", "gate"), ("x", "weight", "gate")])
def test_each_gradient_reaches_the_input_of_its_name(product, wanted):
    op, asked = product
    inputs = {name: torch.randn(2, 3, 4) for name in ("x", "weight", "gate")}
    leaves = [inputs[name].requires_grad_() for name in wanted]
    weights = torch.randn(2, 3, 4)
    plain = 3.0 * inputs["x"] * inputs["weight"] * inputs["gate"]
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    found = torch.autograd.grad((op(Product(**inputs, factor=3.0)) * weights).sum(), leaves)
    assert asked[-1] == set(wanted)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_an_optional_argument_may_be_absent(product):
    op, _ = product
    x, weight = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    op(Product(x, weight)).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach())
    torch.testing.assert_close(weight.grad, x.detach())


def test_a_compiled_op_has_no_graph_break(product):
    op, _ = product
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)

    def run(x):
        return op(Product(x, weight, factor=2.0))

    torch.compile(run, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight)


@pytest.mark.parametrize(("name", "kind"), OPS)
def test_the_schema_has_every_field_in_order(name, kind):
    schema = getattr(torch.ops.hybrid_kernels, name).default._schema
    assert tuple(x.name for x in schema.arguments) == (*kind.NAMES, "wanted")


@pytest.mark.parametrize("kind", RECORDS)
def test_gradients_are_those_of_all_floating_tensors(kind):
    assert kind.Gradients._fields == tuple(n for n in kind.TENSORS if n != "cu_seqlens")
    assert all(x is None for x in kind.Gradients())


def test_an_argument_that_a_backend_does_not_take_is_folded_away():
    q = torch.randn(1, 5, 1, 4)
    a = LinearAttention(q, q, q, write_scale=torch.rand(1, 5, 2))
    a = a.replace(v=torch.randn(1, 5, 2, 4))
    assert a.fold(("write_scale",)) is a
    folded = a.fold(())
    assert folded.write_scale is None
    assert torch.equal(folded.v, a.v * a.write_scale[..., None])
