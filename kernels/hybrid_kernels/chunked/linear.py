"""The chunked op, and its registration with autograd and the compiler.

``hybrid_kernels::chunked_linear_attention`` is a custom op, so that a compiled model has no graph
break although the way is chosen from the data (``inputs.py``); its backward is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.chunked import stepwise
from hybrid_kernels.chunked.additive import InputChunks
from hybrid_kernels.chunked.chunk_plan import ChunkPlan
from hybrid_kernels.chunked.decode import is_single_step, linear_attention_step
from hybrid_kernels.chunked.gradient import Gradients
from hybrid_kernels.chunked.inputs import DECAYS, Inputs
from hybrid_kernels.chunked.passes import backward, forward
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.fused_qkv_grad import places
from hybrid_kernels.transforms import first_derivatives_only, without_autocast

# Smallest ``write_scale`` that its gradient may be divided by.
NEAR_ZERO = 2.0**-60


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` in chunks, on any device."""
    if is_single_step(a):
        return linear_attention_step(a)
    keep, log_decay = a.wants_gradient(), a.log_decay
    # The gradient of a decay that is fixed per head is a sum over all tokens of terms of either
    # sign, in which the rounding of rescaled ones would show.
    exactly = keep and log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad
    o, final_state, _ = _op(*a.values(), exactly, keep)
    return o, final_state


def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and what is saved for the backward pass (``Saved``)."""
    inputs = Inputs(*arguments)
    p = inputs.problem()
    whole, o = p.plan.empty((inputs.heads, p.v.shape[5]), p.v.dtype, p.v.device)
    state = _first_states(p, inputs.initial_state)
    saved = state.new_empty(inputs.saved_size(p.plan))
    o = o.unflatten(3, (p.heads, -1)).transpose(2, 3)
    forward(p, state, o, _saved(p, saved) if inputs.keep else None)
    if not stepwise.is_finite(state):
        # Tells the backward pass.
        return *stepwise.forward(inputs), saved.fill_(torch.nan)
    final_state = p.plan.unsort_states(_unfold(state, p))
    return p.plan.result(whole), final_state, saved


def _backward(*arguments) -> list[Tensor]:
    """Return the gradients named by ``Inputs.gradient_names``, in that order.

    Args:
        arguments: the fields of ``Inputs``; what was saved; the output, or None to compute it
            again where the gradients need it; the gradient of the output; that of the final
            states, or None; whether that of the decays is wanted; and whether dq, dk and dv are
            returned as one tensor, laid out like q, k and v.
    """
    inputs = Inputs(*arguments[: len(Inputs.NAMES)])
    rest = arguments[len(Inputs.NAMES) :]
    decays_wanted, together = rest[-2:]
    grads = _gradients(inputs, *rest)
    found = [grads[name] for name in inputs.gradient_names(decays_wanted) if name in grads]
    return [grads["qkv"], *found] if together else found


def _gradients(
    inputs: Inputs,
    saved: Tensor,
    o: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    decays_wanted: bool,
    together: bool,
) -> dict[str, Tensor]:
    """Return the gradients by name; with ``together`` "qkv" for those of q, k and v."""
    if saved.numel() and bool(saved[0].isnan()):
        return _gradients_by_steps(inputs, do, dfinal, together)
    if inputs.write_scale is not None and _near_zero(inputs.write_scale):
        return _gradients_of_scaled(inputs, saved, o, do, dfinal, decays_wanted, together)
    p = inputs.problem()
    plan = p.plan
    rows = _Rows(inputs, p, together)
    dbeta = None if p.beta is None else _Memory(plan, p.beta)
    dkey = dvalue = None
    if decays_wanted and p.key_decay is not None:
        dkey = _Memory(plan, p.key_decay, p.dtype)
    if decays_wanted and p.value_decay is not None:
        dvalue = _Memory(plan, p.value_decay, p.dtype)
    dbonus = None if p.bonus is None else torch.zeros_like(p.bonus, dtype=p.dtype)
    dscale = None if p.write_scale is None else _Memory(plan, p.write_scale, p.dtype)
    by_token = (dkey, dvalue, dbeta, dscale)
    *optional, scale = (None if memory is None else memory.chunks for memory in by_token)
    grads = Gradients(*rows.chunks, *optional, dbonus, scale)
    dstate = _first_states(p, dfinal)

    def cut(x: Tensor) -> Tensor:
        return plan.chunks(x.unflatten(2, (p.heads, -1))).transpose(2, 3)

    backward(p, _saved(p, saved), None if o is None else cut(o), cut(do), dstate, grads)

    if not stepwise.is_finite(dstate):
        return _gradients_by_steps(inputs, do, dfinal, together)
    # A scalar decay went with the values or with the keys.
    named = {
        "log_decay": dvalue if dkey is None else dkey,
        "value_log_decay": dvalue,
        "beta": dbeta,
        "bonus": dbonus,
        "write_scale": dscale,
        "initial_state": plan.unsort_states(_unfold(dstate, p)),
    }
    given = inputs.floating()
    found = {n: _like(given[n], x) for n, x in named.items() if n in given and x is not None}
    return {**rows.results(), **found}


def _gradients_by_steps(
    inputs: Inputs, do: Tensor, dfinal: Tensor | None, together: bool
) -> dict[str, Tensor]:
    """Do as ``_gradients`` does where something is not finite."""
    grads = stepwise.backward(inputs, do, dfinal)
    if together:
        found = places(inputs.q, inputs.k, inputs.v)
        assert found is not None
        grads["qkv"] = inputs.q.new_empty(*inputs.q.shape[:2], found.row)
        for part, name in zip(found.cut(grads["qkv"]), "qkv", strict=True):
            part.copy_(grads.pop(name))
    return grads


def _near_zero(write_scale: Tensor) -> bool:
    """Whether a product with it cannot be divided by it again; NaN counts as zero."""
    return write_scale.numel() > 0 and not bool(write_scale.abs().amin() > NEAR_ZERO)


def _gradients_of_scaled(inputs: Inputs, *rest: Any) -> dict[str, Tensor]:
    """Do as ``_gradients`` does, with the values multiplied beforehand."""
    assert inputs.write_scale is not None
    v, scale = inputs.v.to(inputs.dtype), inputs.write_scale.to(inputs.dtype)[..., None]
    v = v.repeat_interleave(inputs.heads // v.shape[2], dim=2)
    grads = _gradients(inputs.replace(v=v * scale, write_scale=None), *rest)
    dv = grads["v"]
    grads["v"] = _like(inputs.v, dv * scale)
    grads["write_scale"] = _like(inputs.write_scale, (dv * v).sum(-1))
    return grads


class _Rows:
    """Memory for the gradients of q, k and v: side by side, or each by itself.

    Attributes:
        chunks: of each, to be filled.
    """

    def __init__(self, inputs: Inputs, p: InputChunks, together: bool):
        self.given, self.plan = (inputs.q, inputs.k, inputs.v), p.plan
        self.memory = [] if together else [_Memory(p.plan, x) for x in (p.q, p.k, p.v)]
        if not together:
            self.chunks = [memory.chunks for memory in self.memory]
            return
        found = places(*self.given)
        assert found is not None
        self.whole, rows = p.plan.empty((found.row,), inputs.q.dtype, inputs.q.device)
        dq, dk, dv = (x.transpose(2, 3) for x in found.cut(rows))
        self.chunks = [dq, dk, dv.unsqueeze(4)]

    def results(self) -> dict[str, Tensor]:
        """Return the one tensor (B, T, row) as "qkv", or the three by name."""
        if not self.memory:
            return {"qkv": self.plan.result(self.whole)}
        found = zip("qkv", self.given, self.memory, strict=True)
        return {name: _like(x, memory) for name, x, memory in found}


class _Memory:
    """A result to be filled chunk by chunk, as the input ``like`` is cut."""

    def __init__(self, plan: ChunkPlan, like: Tensor, dtype: torch.dtype | None = None):
        self.plan = plan
        shape = like.shape[2:3] + like.shape[4:]
        self.whole, chunks = plan.empty(shape, dtype or like.dtype, like.device)
        self.chunks = chunks.transpose(2, 3)


def _like(x: Tensor, grad: _Memory | Tensor | None) -> Tensor:
    """Bring a gradient per token and per head to the shape and dtype of its input."""
    assert grad is not None
    if isinstance(grad, _Memory):
        grad = grad.plan.result(grad.whole)
    if x.dim() == 1:
        grad = grad.reshape(-1, x.shape[0]).sum(0)
    elif x.dim() == 4 and grad.numel() != x.numel():
        grad = grad.reshape(*x.shape[:3], -1, x.shape[3]).sum(3)
    return grad.reshape(x.shape).to(x.dtype)


def _fold(states: Tensor, p: InputChunks) -> Tensor:
    """Bring (N, G r, K, V) to (N G, K, r V)."""
    grouped = states.unflatten(1, (p.heads, -1)).transpose(2, 3)
    return grouped.reshape(-1, grouped.shape[2], p.v.shape[4] * p.v.shape[5])


def _unfold(states: Tensor, p: InputChunks) -> Tensor:
    """Undo ``_fold``."""
    groups, shared, size = p.heads, *p.v.shape[4:]
    count = states.shape[0] // groups
    grouped = states.view(count, groups, states.shape[1], shared, size)
    return grouped.transpose(2, 3).flatten(1, 2).contiguous()


def _first_states(p: InputChunks, states: Tensor | None) -> Tensor:
    """Bring (N, H, K, V), or zeros for None, into the form of ``passes.py`` (a copy)."""
    if states is None:
        rows = p.plan.sequences * p.heads
        return torch.zeros(rows, *p.state_shape, dtype=p.dtype, device=p.q.device)
    return _fold(p.plan.sort_states(states.to(p.dtype)), p)


def _saved(p: InputChunks, memory: Tensor) -> Saved:
    return Saved(p.plan, p.heads, p.state_shape, p.beta is not None, memory)


_op = torch.library.custom_op(
    "hybrid_kernels::chunked_linear_attention",
    without_autocast(_forward),
    mutates_args=(),
    schema=f"({Inputs.SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "hybrid_kernels::chunked_linear_attention_backward",
    without_autocast(_backward),
    mutates_args=(),
    schema=f"({Inputs.SCHEMA}, Tensor saved, Tensor? o, Tensor do, Tensor? dfinal, bool decays_wanted,"
    " bool together) -> Tensor[]",
)


@_op.register_fake
def _(*arguments):
    inputs = Inputs(*arguments)
    (batch, time, _, key), value = inputs.q.shape, inputs.v.shape[3]
    rows = batch
    if inputs.cu_seqlens is None:
        size = inputs.saved_size()
    else:
        rows = inputs.cu_seqlens.shape[0] - 1
        size = torch.library.get_ctx().new_dynamic_size() if inputs.keep else 0
    return (
        inputs.v.new_empty(batch, time, inputs.heads, value),
        inputs.q.new_empty(rows, inputs.heads, key, value, dtype=inputs.dtype),
        inputs.q.new_empty(size, dtype=inputs.dtype),
    )


@_backward_op.register_fake
def _(*arguments):
    inputs = Inputs(*arguments[: len(Inputs.NAMES)])
    decays_wanted, together = arguments[-2:]
    given = inputs.floating()
    found = {name: given[name] for name in inputs.gradient_names(decays_wanted)}
    if together:
        rows = torch.cat([found.pop(name).flatten(2) for name in "qkv"], dim=2)
        found = {"qkv": rows, **found}
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found.values()]


def _decays_wanted(ctx) -> bool:
    return any(ctx.needs_input_grad[Inputs.NAMES.index(name)] for name in DECAYS)


def _keep(ctx, inputs, output) -> None:
    o, _, saved = output
    helps = _decays_wanted(ctx) and Inputs(*inputs).output_helps()
    count = len(Inputs.TENSORS)
    ctx.save_for_backward(*inputs[:count], saved, o if helps else None)
    ctx.options, ctx.output = inputs[count:], (o.shape, o.dtype)
    # No zeros for what was saved, nor for final states that nothing was made of.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dfinal, _):
    *tensors, saved, o = ctx.saved_tensors
    inputs = Inputs(*tensors, *ctx.options)
    if do is None:
        shape, dtype = ctx.output
        do = inputs.q.new_zeros(shape, dtype=dtype)
    wanted = _decays_wanted(ctx)
    # A compiler has its own mind about memory; values that are scaled may have to be copied; and a
    # gradient that is wanted by itself would hold the memory of three.
    alone = torch.compiler.is_compiling() or inputs.write_scale is not None
    alone = alone or not all(ctx.needs_input_grad[:3])
    rows = None if alone else places(inputs.q, inputs.k, inputs.v)
    found = _backward_op(*inputs.values(), saved, o, do, dfinal, wanted, rows is not None)
    if rows is not None:
        found[:1] = rows.hand_out(found[0])
    grads = dict(zip(inputs.gradient_names(wanted), found, strict=True))
    return tuple([grads.get(name) for name in Inputs.NAMES])


_op.register_autograd(_differentiate, setup_context=_keep)
first_derivatives_only("linear_attention", _op, _backward_op)
