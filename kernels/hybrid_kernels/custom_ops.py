"""Custom ops made from a record of arguments: schema, autograd, and gradients by name.

A backend supplies two functions over records. PyTorch's dispatcher passes flat lists of tensors:
this file is the one place that converts between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.arguments import Arguments
from hybrid_kernels.fused_qkv_grad import Places
from hybrid_kernels.transforms import first_derivatives_only, without_autocast

Wanted = frozenset[str]


class BackwardInputs(NamedTuple):
    """What a backward pass gets beside the record.

    Attributes:
        wanted: names of the inputs whose gradients are wanted.
        grad_output: gradient of the output.
        grad_state: gradient of the final states, or None.
        saved: what the forward pass returned last, or None where it saves nothing.
        output: the output, where it was to be saved.
        fused: whether the gradients of the first three inputs are returned as one tensor, under the
            name of the first (``fused_qkv_grad.py``).
    """

    wanted: Wanted
    grad_output: Tensor
    grad_state: Tensor | None = None
    saved: Tensor | None = None
    output: Tensor | None = None
    fused: bool = False


def custom_op(
    name: str,
    record: type[Arguments],
    forward: Callable[[Any, Wanted], Any],
    backward: Callable[[Any, BackwardInputs], Any],
    fake: Callable[[Any, Wanted], Any],
    results: str = "Tensor, Tensor, Tensor",
    saves_output: Callable[[Any, Wanted], bool] | None = None,
    fuses: Callable[[Any, Wanted], Places | None] | None = None,
) -> Callable[[Any], Any]:
    """Register ``hybrid_kernels::name`` and ``hybrid_kernels::name_backward``.

    Both are custom ops, so that a compiled model has no graph break.

    Args:
        name: of the op.
        record: the type of its arguments.
        forward: from the record and the names of the inputs whose gradients will be wanted (none if
            no backward pass follows) to the output, the final states and what is saved; or to the
            output alone.
        backward: from the record and ``BackwardInputs`` to ``record.Gradients``, with at least the
            gradients that are wanted, in the shapes and dtypes of the inputs.
        fake: as ``forward``, returns empty tensors of the right shapes.
        results: schema of what ``forward`` returns.
        saves_output: whether the output is saved for the backward pass as well.
        fuses: returns how the first three inputs lie in one tensor if their gradients are to be
            returned in one as well, else None.

    Returns:
        a function from the record to what ``forward`` returns.
    """
    count, tensors, names = len(record.NAMES), len(record.TENSORS), record.DIFFERENTIABLE

    def unpack(values: tuple) -> tuple[Any, Wanted, tuple]:
        flags = values[count]
        wanted = frozenset(n for n, flag in zip(names, flags, strict=True) if flag)
        return record(*values[:count]), wanted, values[count + 1 :]

    def run_forward(*values: Any) -> Any:
        a, wanted, _ = unpack(values)
        return forward(a, wanted)

    def run_backward(*values: Any) -> list[Tensor]:
        a, wanted, rest = unpack(values)
        given = BackwardInputs(wanted, *rest)
        grads, skipped = backward(a, given), names[1:3] if given.fused else ()
        return [getattr(grads, n) for n in names if n in wanted and n not in skipped]

    def library_op(name: str, function: Callable, schema: str) -> Any:
        return torch.library.custom_op(
            f"hybrid_kernels::{name}", without_autocast(function), mutates_args=(), schema=schema
        )

    op = library_op(name, run_forward, f"({record.SCHEMA}, bool[] wanted) -> ({results})")
    inputs = "Tensor grad_output, Tensor? grad_state, Tensor? saved, Tensor? output, bool fused"
    schema = f"({record.SCHEMA}, bool[] wanted, {inputs}) -> Tensor[]"
    backward_op = library_op(f"{name}_backward", run_backward, schema)

    @op.register_fake
    def _(*values: Any) -> Any:
        a, wanted, _ = unpack(values)
        return fake(a, wanted)

    @backward_op.register_fake
    def _(*values: Any) -> list[Tensor]:
        a, wanted, rest = unpack(values)
        chosen = [getattr(a, n) for n in names if n in wanted]
        if BackwardInputs(wanted, *rest).fused:
            chosen[:3] = [torch.cat([x.flatten(2) for x in chosen[:3]], dim=2)]
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in chosen]

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        results: list[Tensor] = [*output] if isinstance(output, tuple) else [output]
        saved = results[2] if len(results) > 2 else None
        a, wanted, _ = unpack(inputs)
        o = results[0] if saves_output is not None and saves_output(a, wanted) else None
        ctx.save_for_backward(*inputs[:tensors], saved, o)
        ctx.options, ctx.output = inputs[tensors:], (results[0].shape, results[0].dtype)
        # No zeros for what was saved, nor for final states that are not used.
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_output: Tensor | None, *rest: Tensor | None) -> tuple:
        *given, saved, o = ctx.saved_tensors
        if grad_output is None:
            shape, dtype = ctx.output
            grad_output = given[0].new_zeros(shape, dtype=dtype)
        a, wanted, _ = unpack((*given, *ctx.options))
        places = None if fuses is None else fuses(a, wanted)
        grad_state = rest[0] if rest else None
        extra = (grad_output, grad_state, saved, o, places is not None)
        grads = backward_op(*given, *ctx.options, *extra)
        if places is not None:
            grads[:1] = places.hand_out(grads[0])
        by_name = dict(zip([n for n in names if n in wanted], grads, strict=True))
        return (*[by_name.get(n) for n in record.NAMES], None)

    op.register_autograd(differentiate, setup_context=save)
    first_derivatives_only(record.OP, op, backward_op)

    def call(a: Any) -> Any:
        return op(*[getattr(a, n) for n in record.NAMES], a.requires_grad())

    return call
