"""The chunked op: which way and chunk size, and its registration with autograd and the compiler.

``hybrid_kernels::chunked_linear_attention`` is a custom op, so that a compiled model has no graph
break although the way is chosen from the data; its backward is another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_kernels.chunked.decode import is_single_step, linear_attention_step
from hybrid_kernels.chunked.gates import RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN
from hybrid_kernels.chunked.gradient import Gradients
from hybrid_kernels.chunked.kept import Kept
from hybrid_kernels.chunked.layout import Layout
from hybrid_kernels.chunked.passes import backward, forward
from hybrid_kernels.chunked.segment import Problem
from hybrid_kernels.packing import document_lengths
from hybrid_kernels.validation import state_dtype

SMALLEST_CHUNK = 16

# Tokens x heads that one segment works on at a time: its matrices should stay in a core's cache.
# Where a backward pass follows, memory is short anyway, and fewer segments are fewer calls.
SEGMENT_ROWS = 1024
SEGMENT_ROWS_KEPT = 2048


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` in chunks, on any device."""
    decays = (log_decay, value_log_decay)
    if is_single_step(q.shape[1], cu_seqlens, q, k, v, *decays, beta, bonus, initial_state):
        return linear_attention_step(q, k, v, *decays, beta, bonus, scale, initial_state)
    inputs = (q, k, v, *decays, beta, bonus, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # The gradient of a decay that is fixed per head is a sum over all tokens of terms of either
    # sign, in which the rounding of rescaled ones would show.
    exactly = keep and log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad
    o, final_state, _ = torch.ops.hybrid_kernels.chunked_linear_attention(
        *inputs, cu_seqlens, scale, chunk_size or 0, exactly, keep
    )
    return o, final_state


@torch.library.custom_op("hybrid_kernels::chunked_linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    exactly: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and what is kept for the backward pass (``Kept``)."""
    decays = (log_decay, value_log_decay)
    p = _problem(q, k, v, *decays, beta, bonus, cu_seqlens, scale, chunk_size, exactly, keep)
    o = _Memory(p.layout, p.v)
    if initial_state is None:
        initial_state = _no_states(p, v)
    state = _fold(p.layout.sort_states(initial_state.to(p.dtype)), p)
    saved = state.new_empty(_kept_size(q, k, v, beta, chunk_size, p) if keep else 0)
    forward(p, state, o.chunks, _kept(p, saved) if keep else None)
    final_state = p.layout.unsort_states(_unfold(state, p))
    return p.layout.result(o.whole).flatten(2, 3), final_state, saved


@torch.library.custom_op("hybrid_kernels::chunked_linear_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    exactly: bool,
    saved: Tensor,
    o: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    decays_wanted: bool,
) -> list[Tensor]:
    """Return the gradients of the tensors that are not None, in order.

    Without the output ``o``, what of it the gradients need is computed again.
    """
    decays = (log_decay, value_log_decay)
    p = _problem(q, k, v, *decays, beta, bonus, cu_seqlens, scale, chunk_size, exactly, True)
    layout = p.layout
    dq, dk, dv = (_Memory(layout, x) for x in (p.q, p.k, p.v))
    dbeta = None if p.beta is None else _Memory(layout, p.beta)
    dkey = dvalue = None
    if decays_wanted and p.key_decay is not None:
        dkey = _Memory(layout, p.key_decay, p.dtype)
    if decays_wanted and p.value_decay is not None:
        dvalue = _Memory(layout, p.value_decay, p.dtype)
    dbonus = None if bonus is None else torch.zeros_like(bonus, dtype=p.dtype)
    optional = (None if memory is None else memory.chunks for memory in (dkey, dvalue, dbeta))
    grads = Gradients(dq.chunks, dk.chunks, dv.chunks, *optional, dbonus)
    if dfinal is None:
        dfinal = _no_states(p, v)
    dstate = _fold(layout.sort_states(dfinal.to(p.dtype)), p)

    def cut(x: Tensor) -> Tensor:
        return layout.chunks(x.unflatten(2, (p.heads, -1))).transpose(2, 3)

    backward(p, _kept(p, saved), None if o is None else cut(o), cut(do), dstate, grads)

    # A scalar decay went with the values or with the keys.
    dlog_decay = dvalue if dkey is None else dkey
    found: list[tuple[Tensor | None, _Memory | Tensor | None]] = [(q, dq), (k, dk), (v, dv)]
    if decays_wanted:
        found += [(log_decay, dlog_decay), (value_log_decay, dvalue)]
    dinitial = layout.unsort_states(_unfold(dstate, p))
    found += [(beta, dbeta), (bonus, dbonus), (initial_state, dinitial)]
    return [_like(x, grad) for x, grad in found if x is not None]


class _Memory:
    """A result to be filled chunk by chunk, as the input ``like`` is cut."""

    def __init__(self, layout: Layout, like: Tensor, dtype: torch.dtype | None = None):
        self.layout = layout
        shape = like.shape[2:3] + like.shape[4:]
        self.whole, chunks = layout.empty(shape, dtype or like.dtype, like.device)
        self.chunks = chunks.transpose(2, 3)


def _like(x: Tensor, grad: _Memory | Tensor | None) -> Tensor:
    """Bring a gradient per token and per head to the shape and dtype of its input."""
    assert grad is not None
    if isinstance(grad, _Memory):
        grad = grad.layout.result(grad.whole)
    if x.dim() == 1:
        grad = grad.reshape(-1, x.shape[0]).sum(0)
    elif x.dim() == 4 and grad.numel() != x.numel():
        grad = grad.reshape(*x.shape[:3], -1, x.shape[3]).sum(3)
    return grad.reshape(x.shape).to(x.dtype)


def _no_states(p: Problem, v: Tensor) -> Tensor:
    """Return (N, H, K, V) zeros."""
    shape = (p.layout.sequences, p.heads * p.v.shape[4], p.k.shape[4], v.shape[3])
    return torch.zeros(shape, dtype=p.dtype, device=v.device)


def _fold(states: Tensor, p: Problem) -> Tensor:
    """Bring (N, G r, K, V) to (N G, K, r V)."""
    grouped = states.unflatten(1, (p.heads, -1)).transpose(2, 3)
    return grouped.reshape(-1, grouped.shape[2], p.v.shape[4] * p.v.shape[5])


def _unfold(states: Tensor, p: Problem) -> Tensor:
    """Undo ``_fold``."""
    groups, shared, size = p.heads, *p.v.shape[4:]
    count = states.shape[0] // groups
    grouped = states.view(count, groups, states.shape[1], shared, size)
    return grouped.transpose(2, 3).flatten(1, 2).contiguous()


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    exactly: bool,
    keep: bool,
) -> Problem:
    """Choose the way (or be told ``exactly``) and chunk size; cut the inputs into chunks."""
    batch, time = q.shape[:2]
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, time, heads)
    lengths = None if cu_seqlens is None else document_lengths(cu_seqlens, time)
    longest = time if lengths is None else max(lengths)
    layout, exact = _choose(
        [g for g in (log_decay, value_log_decay) if g is not None],
        lambda size: Layout(
            batch,
            time,
            size,
            lambda n: _span(n, q, k, v, beta, chunk_size, keep),
            lengths,
            q.device,
        ),
        chunk_size or _default_chunk(beta is not None, max(q.shape[3], v.shape[3]), longest),
        longest,
    )
    exact = exact or exactly
    # A scalar decay goes with the values, which leaves queries and keys to be shared by heads;
    # but pairs of rows decay on the key side where they do so exactly.
    scalar = log_decay is not None and log_decay.dim() == 3
    if scalar:
        log_decay = log_decay[..., None]
    key_decay, value_decay = log_decay, value_log_decay
    if scalar and not (exact or bonus is not None or value_log_decay is not None):
        key_decay, value_decay = None, log_decay
    groups = heads
    if beta is None and bonus is None and key_decay is None and q.shape[2] == k.shape[2]:
        groups = q.shape[2]

    def cut(x: Tensor, shared: tuple[int, ...] = ()) -> Tensor:
        """Cut (B, T, any heads, ...) into chunks of G, or G x ``shared``, heads."""
        if x.shape[2] < groups:
            x = x.repeat_interleave(heads // x.shape[2], dim=2)
        return layout.chunks(x.unflatten(2, (groups, *shared))).transpose(2, 3)

    return Problem(
        q=cut(q),
        k=cut(k),
        v=cut(v, (-1,)),
        key_decay=None if key_decay is None else cut(key_decay),
        value_decay=None if value_decay is None else cut(value_decay, (-1,)),
        beta=None if beta is None else cut(beta[..., None]),
        bonus=bonus,
        scale=scale,
        exact=exact,
        layout=layout,
        dtype=state_dtype(q, k, v),
    )


def _choose(
    decays: list[Tensor], layout_of: Callable[[int], Layout], chunk: int, longest: int
) -> tuple[Layout, bool]:
    """Halve the chunk until rescaling is safe; if it never is, take the exact way."""
    first = layout = layout_of(chunk)
    while decays and not _bounded([layout.chunks(g) for g in decays], longest):
        if chunk <= SMALLEST_CHUNK:
            return first, True
        chunk //= 2
        layout = layout_of(chunk)
    return layout, False


def _bounded(decays: list[Tensor], longest: int) -> bool:
    """Whether every chunk's total log decay stays above the limits; NaN counts as not.

    Of keys and values together: what is written has been divided by both.
    """
    if decays[0].numel() == 0:
        return True
    limit = max(RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN * min(decays[0].shape[2], longest))
    # Where a decay is fixed per head (and expanded), one chunk is like the other.
    decays = [g[:1] if g.stride(0) == 0 else g for g in decays]
    lowest = torch.stack([g.sum(2, dtype=torch.float32).amin() for g in decays])
    return bool(lowest.sum() >= limit)


def _span(
    sequences: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    chunk_size: int,
    keep: bool,
) -> int:
    """Return how many tokens of each sequence a segment holds; known before the chunk size is."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    rows = SEGMENT_ROWS
    if beta is None:
        # Half of the matrices are of queries and keys, which heads may share.
        heads = (heads + max(q.shape[2], k.shape[2])) // 2
        # The delta rule has about twice as many matrices.
        rows = SEGMENT_ROWS_KEPT if keep else SEGMENT_ROWS
    unit = max(64, chunk_size)
    return unit * max(1, rows // (sequences * heads * unit))


def _default_chunk(delta: bool, widest: int, longest: int) -> int:
    """Return the chunk size for heads of ``widest`` and sequences of at most ``longest``."""
    chunk = 32 if delta or widest <= 32 else 64
    while chunk > SMALLEST_CHUNK and chunk // 2 >= longest:
        chunk //= 2
    return chunk


def _kept(p: Problem, memory: Tensor) -> Kept:
    shape = (p.k.shape[4], p.v.shape[4] * p.v.shape[5])
    return Kept(p.layout, p.heads, shape, p.beta is not None, memory)


def _kept_size(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, chunk_size: int, p: Problem | None
) -> int:
    """Return how many numbers are kept; what is packed is known by its ``Problem`` only."""
    batch, time, heads, key = *q.shape[:2], max(q.shape[2], k.shape[2], v.shape[2]), q.shape[3]
    chunk = chunk_size or _default_chunk(beta is not None, max(key, v.shape[3]), time)
    if p is not None and p.layout.tokens is not None:
        chunks, starts = p.layout.starts[-1], sum(s.width for s in p.layout.segments)
        chunk = p.layout.chunk
    else:
        # Of chunks that are not halved.
        chunks = batch * -(-time // chunk)
        starts = batch * -(-time // _span(batch, q, k, v, beta, chunk_size, True))
        if beta is None:
            starts = chunks + batch
    states = starts * heads * key * v.shape[3]
    return states if beta is None else states + chunks * heads * chunk * (v.shape[3] + chunk)


@_forward.register_fake
def _(
    q,
    k,
    v,
    log_decay,
    value_log_decay,
    beta,
    bonus,
    initial_state,
    cu_seqlens,
    scale,
    chunk_size,
    exactly,
    keep,
):
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not keep:
        count = 0
    elif cu_seqlens is None:
        count = _kept_size(q, k, v, beta, chunk_size, None)
    else:
        count = torch.library.get_ctx().new_dynamic_size()
    dtype = state_dtype(q, k, v)
    return (
        v.new_empty(*q.shape[:2], heads, v.shape[3]),
        q.new_empty(rows, heads, q.shape[3], v.shape[3], dtype=dtype),
        q.new_empty(count, dtype=dtype),
    )


@_backward.register_fake
def _(q, k, v, log_decay, value_log_decay, beta, bonus, initial_state, *rest):
    decays = (log_decay, value_log_decay) if rest[-1] else ()
    found = (q, k, v, *decays, beta, bonus, initial_state)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in found if x is not None
    ]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.chunk_size, ctx.exactly, _ = inputs
    wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    o = output[0] if wanted and _output_helps(*tensors[:6]) else None
    ctx.save_for_backward(*tensors, output[2], o)
    # No zeros for what was kept, nor for final states that nothing was made of.
    ctx.set_materialize_grads(False)
    ctx.output = (output[0].shape, output[0].dtype)


def _output_helps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    beta: Tensor | None,
) -> bool:
    """Whether the backward pass is spared two products by the output, at the full precision.

    The output times its gradient is the gradient of the values' decays; where every value head has
    its own queries and only a scalar decays, they say the same.
    """
    if beta is not None or v.dtype != state_dtype(q, k, v):
        return False
    shared = q.shape[2] == k.shape[2] < v.shape[2]
    return value_log_decay is not None or (
        shared and log_decay is not None and log_decay.dim() == 3
    )


def _differentiate(ctx, do, dfinal, _):
    *tensors, saved, o = ctx.saved_tensors
    if do is None:
        shape, dtype = ctx.output
        do = tensors[0].new_zeros(shape, dtype=dtype)
    wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    found = iter(
        torch.ops.hybrid_kernels.chunked_linear_attention_backward(
            *tensors, ctx.scale, ctx.chunk_size, ctx.exactly, saved, o, do, dfinal, wanted
        )
    )
    skipped = () if wanted else (3, 4)
    grads = [None if x is None or i in skipped else next(found) for i, x in enumerate(tensors[:8])]
    return (*grads, *[None] * 5)


_forward.register_autograd(_differentiate, setup_context=_keep)
