"""The chunked op, and its registration with autograd and the compiler.

``hybrid_kernels::chunked_linear_attention`` is a custom op, so that a compiled model has no graph
break although the way is chosen from the data (``inputs.py``); its backward is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.chunked import stepwise
from hybrid_kernels.chunked.additive import InputChunks
from hybrid_kernels.chunked.chunk_plan import ChunkPlan
from hybrid_kernels.chunked.decode import is_single_step, linear_attention_step
from hybrid_kernels.chunked.gradient import Gradients
from hybrid_kernels.chunked.inputs import DECAYS, DIFFERENTIABLE, SCHEMA, TENSORS, Inputs
from hybrid_kernels.chunked.passes import backward, forward
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.fused_qkv_grad import places
from hybrid_kernels.transforms import first_derivatives_only, without_autocast

# What the gradient of a write's scale may be divided by.
NEAR_ZERO = 2.0**-60


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    write_scale: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` in chunks, on any device."""
    inputs = (q, k, v, log_decay, value_log_decay, beta, bonus, write_scale, initial_state)
    if is_single_step(q.shape[1], cu_seqlens, *inputs):
        return linear_attention_step(*inputs[:-1], scale, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # The gradient of a decay that is fixed per head is a sum over all tokens of terms of either
    # sign, in which the rounding of rescaled ones would show.
    exactly = keep and log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad
    o, final_state, _ = _op(*inputs, cu_seqlens, scale, chunk_size or 0, exactly, keep)
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
    """Return the gradients of the tensors that are not None, in order.

    Beside the op's own arguments, it takes what was saved; the output, or None, whereupon what of it
    the gradients need is computed again; the gradient of the output; that of the final states, or
    None; whether that of the decays is wanted; and whether those of q, k and v are to lie as these
    do in the rows of one tensor, which is then returned in their place.
    """
    *given, saved, o, do, dfinal, decays_wanted, together = arguments
    inputs = Inputs(*given)
    if saved.numel() and bool(saved[0].isnan()):
        return _backward_by_steps(inputs, do, dfinal, decays_wanted, together)
    if inputs.write_scale is not None and _near_zero(inputs.write_scale):
        return _backward_of_scaled(inputs, *arguments[len(given) :])
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
    grads = Gradients(*rows.chunks, *optional, dbonus, scale, rows.stacked)
    dstate = _first_states(p, dfinal)

    def cut(x: Tensor) -> Tensor:
        return plan.chunks(x.unflatten(2, (p.heads, -1))).transpose(2, 3)

    backward(p, _saved(p, saved), None if o is None else cut(o), cut(do), dstate, grads)

    if not stepwise.is_finite(dstate):
        return _backward_by_steps(inputs, do, dfinal, decays_wanted, together)
    # A scalar decay went with the values or with the keys.
    dlog_decay = dvalue if dkey is None else dkey
    found: list[tuple[Tensor | None, _Memory | Tensor | None]] = []
    if decays_wanted:
        found = [(inputs.log_decay, dlog_decay), (inputs.value_log_decay, dvalue)]
    dinitial = plan.unsort_states(_unfold(dstate, p))
    found += [(inputs.beta, dbeta), (inputs.bonus, dbonus)]
    found += [(inputs.write_scale, dscale), (inputs.initial_state, dinitial)]
    return rows.results() + [_like(x, grad) for x, grad in found if x is not None]


def _backward_by_steps(
    inputs: Inputs, do: Tensor, dfinal: Tensor | None, decays_wanted: bool, together: bool
) -> list[Tensor]:
    """Do as ``_backward`` does where something is not finite."""
    grads = stepwise.backward(inputs, do, dfinal)
    if not decays_wanted:
        grads = {
            name: x for name, x in grads.items() if name not in ("log_decay", "value_log_decay")
        }
    rows = [grads[name] for name in ("q", "k", "v")]
    if together:
        found = places(*inputs[:3])
        assert found is not None
        whole = inputs.q.new_empty(*inputs.q.shape[:2], found.row)
        for part, grad in zip(found.cut(whole), rows, strict=True):
            part.copy_(grad)
        rows = [whole]
    others = inputs._fields[3:DIFFERENTIABLE]
    return rows + [grads[name] for name in others if name in grads]


def _near_zero(write_scale: Tensor) -> bool:
    """Whether a product with it cannot be divided by it again; NaN counts as zero."""
    return write_scale.numel() > 0 and not bool(write_scale.abs().amin() > NEAR_ZERO)


def _backward_of_scaled(inputs: Inputs, *rest) -> list[Tensor]:
    """Do as ``_backward`` does, with the values multiplied beforehand."""
    assert inputs.write_scale is not None
    v, scale = inputs.v.to(inputs.dtype), inputs.write_scale.to(inputs.dtype)[..., None]
    v = v.repeat_interleave(inputs.heads // v.shape[2], dim=2)
    found = _backward(*inputs._replace(v=v * scale, write_scale=None), *rest)
    dv = found[2]
    found[2] = _like(inputs.v, dv * scale)
    dscale = _like(inputs.write_scale, (dv * v).sum(-1))
    found.insert(len(found) - (inputs.initial_state is not None), dscale)
    return found


class _Rows:
    """Memory for the gradients of q, k and v: side by side, or each by itself.

    Attributes:
        chunks: of each, to be filled.
        stacked: (3, ...) the three in one view, or None.
    """

    def __init__(self, inputs: Inputs, p: InputChunks, together: bool):
        self.given, self.plan, self.stacked = inputs[:3], p.plan, None
        self.memory = [] if together else [_Memory(p.plan, x) for x in (p.q, p.k, p.v)]
        if not together:
            self.chunks = [memory.chunks for memory in self.memory]
            return
        found = places(*self.given)
        assert found is not None
        self.whole, rows = p.plan.empty((found.row,), inputs.q.dtype, inputs.q.device)
        dq, dk, dv = (x.transpose(2, 3) for x in found.cut(rows))
        self.chunks = [dq, dk, dv.unsqueeze(4)]
        stacked = found.stack(rows)
        self.stacked = None if stacked is None else stacked.transpose(3, 4)

    def results(self) -> list[Tensor]:
        """Return the one tensor (B, T, row), or the three."""
        if not self.memory:
            return [self.plan.result(self.whole)]
        return [_like(x, memory) for x, memory in zip(self.given, self.memory, strict=True)]


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
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "hybrid_kernels::chunked_linear_attention_backward",
    without_autocast(_backward),
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor saved, Tensor? o, Tensor do, Tensor? dfinal, bool decays_wanted,"
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
    *_, decays_wanted, together = arguments
    found = [
        x
        for i, x in enumerate(arguments[:DIFFERENTIABLE])
        if x is not None and (decays_wanted or i not in DECAYS)
    ]
    if together:
        q, k, v = found[:3]
        found[:3] = [torch.cat([x.flatten(2) for x in (q, k, v)], dim=2)]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found]


def _keep(ctx, inputs, output) -> None:
    o, _, saved = output
    wanted = any(ctx.needs_input_grad[i] for i in DECAYS)
    helps = wanted and Inputs(*inputs).output_helps()
    ctx.save_for_backward(*inputs[:TENSORS], saved, o if helps else None)
    ctx.options, ctx.output = inputs[TENSORS:], (o.shape, o.dtype)
    # No zeros for what was saved, nor for final states that nothing was made of.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dfinal, _):
    *tensors, saved, o = ctx.saved_tensors
    inputs = Inputs(*tensors, *ctx.options)
    if do is None:
        shape, dtype = ctx.output
        do = tensors[0].new_zeros(shape, dtype=dtype)
    wanted = any(ctx.needs_input_grad[i] for i in DECAYS)
    # A compiler has its own mind about memory; values that are scaled may have to be copied; and a
    # gradient that is wanted by itself would hold the memory of three.
    alone = torch.compiler.is_compiling() or inputs.write_scale is not None
    alone = alone or not all(ctx.needs_input_grad[:3])
    rows = None if alone else places(*tensors[:3])
    together = rows is not None
    found = _backward_op(*tensors, *ctx.options, saved, o, do, dfinal, wanted, together)
    if rows is not None:
        found[:1] = rows.hand_out(found[0])
    found = iter(found)
    absent = () if wanted else DECAYS
    grads = [
        None if x is None or i in absent else next(found)
        for i, x in enumerate(tensors[:DIFFERENTIABLE])
    ]
    return (*grads, *[None] * (len(ctx.needs_input_grad) - DIFFERENTIABLE))


_op.register_autograd(_differentiate, setup_context=_keep)
first_derivatives_only("linear_attention", _op, _backward_op)
