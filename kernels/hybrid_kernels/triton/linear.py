"""``linear_attention`` in Triton kernels: two custom ops, and the order of the kernels in each.

As custom ops they cost a compiled model no graph break. The backward pass keeps only the inputs
and, for the delta rule, the triangular inverse; states are computed again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.transforms import first_derivatives_only, without_autocast
from hybrid_kernels.triton import launches as run
from hybrid_kernels.triton.decode import decode
from hybrid_kernels.triton.launch import default_chunk, inverse_parts, operands, stored_dtype
from hybrid_kernels.triton.launches import Across, ChunkedInputs, Inputs, Rows, chunk_inputs
from hybrid_kernels.triton.layout import counts

FEW_KEYS = 64

Gradients = dict[str, Tensor | None]


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention``; ``unsupported`` says for which inputs."""
    q, k, v, log_decay, value_log_decay = a.q, a.k, a.v, a.log_decay, a.value_log_decay
    beta, bonus, scale, cu_seqlens = a.beta, a.bonus, a.scale, a.cu_seqlens
    initial_state = None if a.initial_state is None else a.initial_state.float()
    learning = a.wants_gradient()
    if a.time == 1 and cu_seqlens is None and not learning:
        return decode(q, k, v, log_decay, value_log_decay, beta, bonus, initial_state, scale)
    dtype = v.dtype
    if stored_dtype(q, k, v) == torch.bfloat16 and _needs_float32(q, log_decay, beta, learning):
        q, k, v = q.float(), k.float(), v.float()
    dot, _ = operands(q.device, q, k, v)
    chunk = a.chunk_size or default_chunk(dot, beta is not None, q.shape[3])
    heads = a.heads
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*q.shape[:2], heads)
    if value_log_decay is not None and log_decay is not None and log_decay.dim() == 3:
        # One number for the whole state is also one for each of its columns.
        value_log_decay = value_log_decay.float() + log_decay.float()[..., None]
        log_decay = None
    decays = (log_decay, value_log_decay)
    if bonus is None:
        o, final, _ = _forward(q, k, v, *decays, beta, initial_state, cu_seqlens, scale, chunk)
        return o.to(dtype), final
    if initial_state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (rows, heads, q.shape[3], v.shape[3])
        initial_state = torch.zeros(shape, dtype=torch.float32, device=q.device)
    later = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
    o, final, _ = _forward(later, k, v, *decays, beta, initial_state, cu_seqlens, scale, chunk)
    return _exclusive(o, q, k, v, bonus, scale, initial_state, cu_seqlens).to(dtype), final


def _needs_float32(
    q: Tensor, log_decay: Tensor | None, beta: Tensor | None, learning: bool
) -> bool:
    """Say whether bfloat16 is too coarse for products, so that they are made of float32 rows.

    The gradient of a decay per head is one sum over all tokens, whose terms cancel. The delta rule
    with fewer keys than a chunk has rows overwrites every key again and again.
    """
    if beta is not None and q.shape[3] < FEW_KEYS:
        return True
    return learning and log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad


def _exclusive(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bonus: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return the read of S_{t-1} with a bonus from ``o_t``, what q_{t+1} reads of S_t.

    The first token of a sequence reads the initial state, whatever stood before it in ``o``.
    """
    heads = o.shape[2]
    q, k, v = (x.repeat_interleave(heads // x.shape[2], dim=2).float() for x in (q, k, v))
    before = torch.cat([torch.zeros_like(o[:, :1]), o[:, :-1]], dim=1).float()
    if cu_seqlens is None:
        first = (q[:, :1, ..., None] * initial_state[:, None]).sum(-2) * scale
        before = torch.cat([first, before[:, 1:]], dim=1)
    elif q.shape[1]:
        offsets = cu_seqlens.to(q.device).long()
        index = torch.arange(q.shape[1], device=q.device)
        owner = torch.searchsorted(offsets[1:], index, right=True)
        starts = (offsets[owner] == index)[None, :, None, None]
        # One row per document: an empty one has no first token, its row is not used.
        row = offsets[:-1].clamp(max=q.shape[1] - 1)
        first = (q[0, row][..., None] * initial_state).sum(-2) * scale
        before = torch.where(starts, first[owner][None], before)
    own = (q * bonus.float() * k).sum(-1, keepdim=True) * scale
    return (before + own * v).to(o.dtype)


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and the inverse of the delta rule (or nothing).

    Args:
        arguments: the fields of ``Inputs``.
    """
    p = chunk_inputs(Inputs(*arguments))
    rows = run.make_rows(p)
    inverse = rows.inverse if p.delta else p.empty(0)
    if run.walks(p):
        return *run.fused_chunk_forward(p, rows), inverse
    states, final, u = run.states_forward(p, rows)
    return run.outputs_forward(p, rows, u, states), final, inverse


def backward(*arguments) -> list[Tensor]:
    """Return the gradients of the tensors that are not None, in order.

    Args:
        arguments: the fields of ``Inputs``, the inverse, the gradients of output and final states.
    """
    *given, inverse, do, dfinal = arguments
    inputs = Inputs(*given)
    p = chunk_inputs(inputs, backward=True)
    rows = run.make_rows(p, inverse)
    do, dfinal = do.contiguous(), dfinal.contiguous()
    if p.delta:
        grads = _delta_backward(p, rows, do, dfinal)
    elif p.value:
        grads = _value_backward(p, rows, do, dfinal)
    else:
        grads = _additive_backward(p, rows, do, dfinal)
    return [_like(x, grads[name]) for name, x in inputs.differentiable()]


def _additive_backward(p: ChunkedInputs, rows: Rows, do: Tensor, dfinal: Tensor) -> Gradients:
    states, _, _ = run.states_forward(p, rows)
    dstates, dinitial = run.states_backward(p, rows, do, p.q, p.q, dfinal)
    dv = p.like(p.v)
    run.values_backward(p, rows, do, dv, dstates)
    across = run.pairs_backward(p, p.v, do)
    dq, dk, dg, _ = run.keys_backward(p, states, dstates, across)
    return {"q": dq, "k": dk, "v": dv, "log_decay": dg, "initial_state": dinitial}


def _value_backward(p: ChunkedInputs, rows: Rows, do: Tensor, dfinal: Tensor) -> Gradients:
    """With a decay over values the second half is the first with keys and values swapped."""
    states, _, _ = run.states_forward(p, rows)
    dstates, dinitial = run.states_backward(p, rows, do, p.q, p.q, dfinal)
    swapped = run.swap_kv(p, do)
    columns = run.make_rows(swapped)
    across = Across(columns.k, columns.q, columns.pairs * p.scale, total=columns.total)
    dq, dk, dg, _ = run.keys_backward(p, states, dstates, across)
    if p.vector:
        across = Across(rows.k, rows.q, rows.pairs * p.scale, total=rows.total, swapped=True)
    else:
        q = p.q.repeat_interleave(p.heads // p.q.shape[2], dim=2)
        across = replace(run.pairs_backward(swapped, p.k, q), swapped=True)
    _, dv, dvalue_g, _ = run.keys_backward(swapped, states, dstates, across)
    grads = {"q": dq, "k": dk, "v": dv, "log_decay": dg, "value_log_decay": dvalue_g}
    return {**grads, "initial_state": dinitial}


def _delta_backward(p: ChunkedInputs, rows: Rows, do: Tensor, dfinal: Tensor) -> Gradients:
    states, _, u = run.states_forward(p, rows)
    dx, dv = torch.empty_like(u), p.like(p.v)
    # What u gains of the chunk's own outputs; the rest is known once the states' gradients are.
    run.values_backward(p, rows, do, dx, None)
    dstates, dinitial = run.states_backward(p, rows, do, dv, dx, dfinal)
    across = run.pairs_backward(p, u, do, dx)
    dq, dk, dg, dbeta = run.keys_backward(p, states, dstates, across)
    grads = {"q": dq, "k": dk, "v": dv, "log_decay": dg, "beta": dbeta}
    return {**grads, "initial_state": dinitial}


def _like(x: Tensor, grad: Tensor | None) -> Tensor:
    """Sum a gradient over the heads that share an input, and bring it to the input's dtype."""
    assert grad is not None
    if x.dim() == 4 and grad.shape[2] != x.shape[2]:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    return grad.to(x.dtype)


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? value_log_decay, Tensor? beta, "
    "Tensor? initial_state, Tensor? cu_seqlens, float scale, SymInt chunk"
)
_forward = torch.library.custom_op(
    "hybrid_kernels::triton_linear_attention",
    without_autocast(forward),
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
_backward = torch.library.custom_op(
    "hybrid_kernels::triton_linear_attention_backward",
    without_autocast(backward),
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor inverse, Tensor do, Tensor dfinal) -> Tensor[]",
)


@_forward.register_fake
def _(*arguments):
    q, k, v, *_ = inputs = Inputs(*arguments)
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    sequences, count = counts(q, inputs.cu_seqlens, inputs.chunk)
    o = v.new_empty(*q.shape[:2], heads, v.shape[3])
    final = q.new_empty(sequences, heads, q.shape[3], v.shape[3], dtype=torch.float32)
    shape, width = (0,), stored_dtype(q, k, v)
    if inputs.beta is not None:
        parts = inverse_parts(True, inputs.log_decay is not None, q.shape[3], width)
        shape = (count * heads, parts, inputs.chunk, inputs.chunk)
    return o, final, q.new_empty(shape, dtype=width)


@_backward.register_fake
def _(*arguments):
    *given, _, _, _ = arguments
    return [x.new_empty(x.shape) for _, x in Inputs(*given).differentiable()]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradient(ctx, do, dfinal, _):
    *tensors, inverse = ctx.saved_tensors
    found = iter(_backward(*tensors, ctx.scale, ctx.chunk, inverse, do, dfinal))
    # cu_seqlens, the last tensor, has none.
    grads = [None if x is None else next(found) for x in tensors[:-1]]
    return (*grads, None, None, None)


torch.library.register_autograd(
    "hybrid_kernels::triton_linear_attention", _gradient, setup_context=_setup_context
)
first_derivatives_only("linear_attention", _forward, _backward)
