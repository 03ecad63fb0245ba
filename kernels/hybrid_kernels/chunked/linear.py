"""``linear_attention`` in chunks: the custom op of the ``torch`` backend.

Shapes: B batch, T time, H heads, G heads of q and k, r value heads per G, K key dim, V value dim,
N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.chunked.decode import is_single_step, linear_attention_step
from hybrid_kernels.chunked.gradients import GradientMemory, fuse
from hybrid_kernels.chunked.inputs import InputChunks, cut_inputs
from hybrid_kernels.chunked.passes import backward_pass, forward_pass
from hybrid_kernels.chunked.saved import Saved
from hybrid_kernels.chunked.sizes import saved_size
from hybrid_kernels.chunked.stepwise import is_finite, stepwise_backward, stepwise_forward
from hybrid_kernels.custom_ops import BackwardInputs, Wanted, custom_op
from hybrid_kernels.fused_qkv_grad import Places, places


def linear_attention(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``hybrid_kernels.linear_attention`` in chunks, on any device."""
    if is_single_step(a):
        return linear_attention_step(a)
    o, final_state, _ = _chunked(a)
    return o, final_state


def _forward(a: LinearAttention, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the final states, and what is saved for the backward pass (``Saved``)."""
    x = cut_inputs(a, wanted)
    plan = x.plan
    whole, out = plan.empty((a.heads, x.v.shape[5]), x.v.dtype, x.v.device)
    state = _to_chunk_order(x, a.initial_state)
    memory = state.new_empty(saved_size(a, plan) if wanted else 0)
    saved = _saved(x, memory) if wanted else None
    forward_pass(x, state, out.unflatten(3, (x.heads, -1)).transpose(2, 3), saved)
    if not is_finite(state):
        # NaN tells the backward pass to use the reference loop as well.
        return *stepwise_forward(a), memory.fill_(torch.nan)
    return plan.result(whole), _from_chunk_order(x, state), memory


def _backward(a: LinearAttention, given: BackwardInputs) -> tuple:
    """Return ``LinearAttention.Gradients``."""
    memory, grad_output, grad_state = given.saved, given.grad_output, given.grad_state
    assert memory is not None
    fused = places(a.q, a.k, a.v) if given.fused else None

    def by_steps() -> tuple:
        results = stepwise_backward(a, grad_output, grad_state)
        return LinearAttention.Gradients(**(fuse(fused, results) if fused else results))

    if memory.numel() and bool(memory[0].isnan()):
        return by_steps()
    x = cut_inputs(a, given.wanted)
    grads, dstate = GradientMemory(x, given.wanted, fused), _to_chunk_order(x, grad_state)

    def cut(y: Tensor) -> Tensor:
        return x.plan.chunks(y.unflatten(2, (x.heads, -1))).transpose(2, 3)

    output = None if given.output is None else cut(given.output)
    backward_pass(x, _saved(x, memory), output, cut(grad_output), dstate, grads.chunks)
    if not is_finite(dstate):
        return by_steps()
    results = grads.results(a)
    if a.initial_state is not None:
        results["initial_state"] = _from_chunk_order(x, dstate).to(a.initial_state.dtype)
    return LinearAttention.Gradients(**results)


def _saved(x: InputChunks, memory: Tensor) -> Saved:
    return Saved(x.plan, x.heads, x.state_shape, x.erases, memory)


def _to_chunk_order(x: InputChunks, states: Tensor | None) -> Tensor:
    """Bring (N, H, K, V), or zeros for None, to (N G, K, r V) in the plan's order (a copy)."""
    if states is None:
        rows = x.plan.sequences * x.heads
        return torch.zeros(rows, *x.state_shape, dtype=x.dtype, device=x.q.device)
    grouped = x.plan.sort_states(states.to(x.dtype)).unflatten(1, (x.heads, -1))
    return grouped.transpose(2, 3).reshape(-1, *x.state_shape)


def _from_chunk_order(x: InputChunks, states: Tensor) -> Tensor:
    """Undo ``_to_chunk_order``."""
    shared, size = x.v.shape[4:]
    grouped = states.view(-1, x.heads, states.shape[1], shared, size)
    return x.plan.unsort_states(grouped.transpose(2, 3).flatten(1, 2).contiguous())


def _saves_output(a: LinearAttention, wanted: Wanted) -> bool:
    """Whether the output, at its full precision, saves the backward pass two products.

    The output times its gradient is the gradient of the values' decays. Where every value head has
    its own queries and only a scalar decays, queries times their gradient are the same.
    """
    if not wanted & {"log_decay", "value_log_decay"}:
        return False
    if a.erases or a.v.dtype != a.dtype:
        return False
    shared = a.q.shape[2] == a.k.shape[2] < a.v.shape[2]
    scalar = a.log_decay is not None and a.log_decay.dim() == 3
    return a.value_log_decay is not None or (shared and scalar)


def _fuses(a: LinearAttention, wanted: Wanted) -> Places | None:
    # A compiler plans memory itself; a single wanted gradient would hold the memory of three.
    if torch.compiler.is_compiling() or not wanted >= {"q", "k", "v"}:
        return None
    return places(a.q, a.k, a.v)


def _fake(a: LinearAttention, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    (batch, time, _, key), value = a.q.shape, a.v.shape[3]
    size = 0
    if wanted:
        packed = a.cu_seqlens is not None
        size = torch.library.get_ctx().new_dynamic_size() if packed else saved_size(a)
    return (
        a.v.new_empty(batch, time, a.heads, value),
        a.q.new_empty(a.rows, a.heads, key, value, dtype=a.dtype),
        a.q.new_empty(size, dtype=a.dtype),
    )


_chunked = custom_op(
    "chunked_linear_attention",
    LinearAttention,
    _forward,
    _backward,
    _fake,
    saves_output=_saves_output,
    fuses=_fuses,
)
