"""``linear_attention`` in Triton kernels: two custom ops, and the order of the kernels in each.

As custom ops they cost a compiled model no graph break. The backward pass keeps only the inputs
and, for the delta rule, the triangular inverse; states are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.triton.backward import (
    ValueSide,
    keys_backward,
    pairs_backward,
    states_backward,
    values_backward,
)
from hybrid_kernels.triton.decode import decode
from hybrid_kernels.triton.forward import (
    DecayedRows,
    decay_rows,
    fused_chunk_forward,
    outputs_forward,
    states_forward,
)
from hybrid_kernels.triton.inputs import ChunkedInputs, chunk_inputs, swap_kv
from hybrid_kernels.triton.launch import default_chunk, inverse_parts, operands, stored_dtype
from hybrid_kernels.triton.layout import counts

FEW_KEYS = 64

NamedGradients = dict[str, Tensor | None]


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention``; ``unsupported`` lists the exceptions."""
    if a.initial_state is not None:
        a = a.replace(initial_state=a.initial_state.float())
    learning, dtype = a.needs_backward(), a.v.dtype
    if a.time == 1 and a.cu_seqlens is None and not learning:
        return decode(a)
    a = _canonical(a, learning)
    if a.bonus is None:
        o, final, _ = _chunked(a)
        return o.to(dtype), final
    if a.initial_state is None:
        shape = (a.rows, a.heads, a.q.shape[3], a.v.shape[3])
        a = a.replace(initial_state=torch.zeros(shape, dtype=torch.float32, device=a.q.device))
    later = torch.cat([a.q[:, 1:], torch.zeros_like(a.q[:, :1])], dim=1)
    o, final, _ = _chunked(a.replace(q=later, bonus=None))
    return _exclusive(o, a).to(dtype), final


def _canonical(a: LinearAttention, learning: bool) -> LinearAttention:
    """Choose dtype and chunk size, and bring decays into the forms that kernels take."""
    q, k, v, log_decay, value_log_decay = a.q, a.k, a.v, a.log_decay, a.value_log_decay
    narrow = stored_dtype(q, k, v) == torch.bfloat16
    if narrow and _needs_float32(q, log_decay, a.beta, learning):
        q, k, v = q.float(), k.float(), v.float()
    dot, _ = operands(q.device, q, k, v)
    chunk = a.chunk_size or default_chunk(dot, a.beta is not None, q.shape[3])
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(*q.shape[:2], a.heads)
    if value_log_decay is not None and log_decay is not None and log_decay.dim() == 3:
        # One number for the whole state is also one for each of its columns.
        value_log_decay = value_log_decay.float() + log_decay.float()[..., None]
        log_decay = None
    decays = {"log_decay": log_decay, "value_log_decay": value_log_decay}
    return a.replace(q=q, k=k, v=v, chunk_size=chunk, **decays)


def _needs_float32(
    q: Tensor, log_decay: Tensor | None, beta: Tensor | None, learning: bool
) -> bool:
    """Whether bfloat16 is too coarse for products, so that rows are cast to float32.

    The gradient of a decay per head is one sum over all tokens, whose terms cancel. The delta rule
    with fewer keys than a chunk has rows overwrites every key again and again.
    """
    if beta is not None and q.shape[3] < FEW_KEYS:
        return True
    return learning and log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad


def _exclusive(o: Tensor, a: LinearAttention) -> Tensor:
    """Return the read of S_{t-1} with a bonus from ``o_t``, what q_{t+1} reads of S_t.

    The first token of a sequence reads the initial state, whatever stood before it in ``o``.
    """
    bonus, scale, initial_state, cu_seqlens = a.bonus, a.scale, a.initial_state, a.cu_seqlens
    assert bonus is not None
    assert initial_state is not None
    heads = o.shape[2]
    q, k, v = (x.repeat_interleave(heads // x.shape[2], dim=2).float() for x in (a.q, a.k, a.v))
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


def forward(a: LinearAttention, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and the inverse of the delta rule (or nothing)."""
    p = chunk_inputs(a)
    rows = decay_rows(p)
    inverse = p.empty(0) if rows.inverse is None else rows.inverse
    if p.walks:
        return *fused_chunk_forward(p, rows), inverse
    s = states_forward(p, rows)
    return outputs_forward(p, rows, s), s.final, inverse


def backward(a: LinearAttention, given: BackwardInputs) -> tuple:
    """Return ``LinearAttention.Gradients``."""
    p = chunk_inputs(a, backward=True)
    rows = decay_rows(p, given.saved if p.delta else None)
    do, dfinal = given.grad_output.contiguous(), given.grad_state
    if dfinal is None:
        dfinal = torch.zeros(p.chunks.sequences, *p.state_shape, device=p.device)
    if p.delta:
        grads = _delta_backward(p, rows, do, dfinal.contiguous())
    elif p.value:
        grads = _value_backward(p, rows, do, dfinal.contiguous())
    else:
        grads = _additive_backward(p, rows, do, dfinal.contiguous())
    inputs = a.floating()
    return LinearAttention.Gradients(**{n: _like(x, grads[n]) for n, x in inputs.items()})


def _additive_backward(
    p: ChunkedInputs, rows: DecayedRows, do: Tensor, dfinal: Tensor
) -> NamedGradients:
    states = states_forward(p, rows).states
    dstates, dinitial = states_backward(p, rows, do, dfinal)
    dv = p.like(p.v)
    values_backward(p, rows, do, dv, dstates)
    keys = keys_backward(p, states, dstates, pairs_backward(p, p.v, do))
    grads = {"q": keys.q, "k": keys.k, "v": dv, "log_decay": keys.decay}
    return {**grads, "initial_state": dinitial}


def _value_backward(
    p: ChunkedInputs, rows: DecayedRows, do: Tensor, dfinal: Tensor
) -> NamedGradients:
    """With a decay over values the second half is the first with keys and values swapped."""
    states = states_forward(p, rows).states
    dstates, dinitial = states_backward(p, rows, do, dfinal)
    swapped = swap_kv(p, do)
    columns = decay_rows(swapped, seen=True)
    assert columns.pairs is not None
    across = ValueSide(columns.k, columns.q, columns.pairs * p.scale, total=columns.total)
    keys = keys_backward(p, states, dstates, across)
    if p.vector:
        assert rows.pairs is not None
        across = ValueSide(rows.k, rows.q, rows.pairs * p.scale, total=rows.total, swapped=True)
    else:
        q = p.q.repeat_interleave(p.heads // p.q.shape[2], dim=2)
        across = pairs_backward(swapped, p.k, q)._replace(swapped=True)
    values = keys_backward(swapped, states, dstates, across)
    grads = {"q": keys.q, "k": keys.k, "v": values.k, "log_decay": keys.decay}
    return {**grads, "value_log_decay": values.decay, "initial_state": dinitial}


def _delta_backward(
    p: ChunkedInputs, rows: DecayedRows, do: Tensor, dfinal: Tensor
) -> NamedGradients:
    s = states_forward(p, rows)
    dx, dv = torch.empty_like(s.written), p.like(p.v)
    # What u gains of the chunk's own outputs; the rest is known once the states' gradients are.
    values_backward(p, rows, do, dx, None)
    dstates, dinitial = states_backward(p, rows, do, dfinal, dv, dx)
    keys = keys_backward(p, s.states, dstates, pairs_backward(p, s.written, do, dx))
    grads = {"q": keys.q, "k": keys.k, "v": dv, "log_decay": keys.decay, "beta": keys.beta}
    return {**grads, "initial_state": dinitial}


def _like(x: Tensor, grad: Tensor | None) -> Tensor:
    """Sum a gradient over the heads that share an input, and bring it to the input's dtype."""
    assert grad is not None
    if x.dim() == 4 and grad.shape[2] != x.shape[2]:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    return grad.to(x.dtype)


def _fake(a: LinearAttention, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, chunk = a.q, a.k, a.v, a.chunk_size
    assert chunk is not None
    sequences, count = counts(q, a.cu_seqlens, chunk)
    o = v.new_empty(*q.shape[:2], a.heads, v.shape[3])
    final = q.new_empty(sequences, a.heads, q.shape[3], v.shape[3], dtype=torch.float32)
    shape, width = (0,), stored_dtype(q, k, v)
    if a.beta is not None:
        parts = inverse_parts(True, a.log_decay is not None, q.shape[3], width)
        shape = (count * a.heads, parts, chunk, chunk)
    return o, final, q.new_empty(shape, dtype=width)


_chunked = custom_op("triton_linear_attention", LinearAttention, forward, backward, _fake)
