"""``linear_attention`` one step at a time, for inputs that hold NaN or inf.

Products over whole chunks multiply the rows of later tokens by zeros, and 0 * NaN is NaN: one bad
token would reach the tokens before it, and one bad gradient the tokens after it. If the final
states, or the gradients of the initial states, are not finite, the pass is repeated by the
reference loop, in which NaN and inf reach only what the recurrence reaches.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels import reference
from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.packing import document_bounds

# Number of steps whose states the backward pass holds in memory at a time.
PIECE = 64


def is_finite(states: Tensor) -> bool:
    """Whether all states are finite; NaN and inf of every token end up in the states.

    A sum that overflows counts as not finite, which costs time but is not wrong.
    """
    return bool(torch.isfinite(states.sum()))


def stepwise_forward(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Return the output and the final states."""
    return reference.linear_attention(a)


def stepwise_backward(a: LinearAttention, do: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Return the gradients of the floating inputs, by name."""
    tensors = _tensors(a)
    grads = {name: torch.zeros_like(x) for name, x in tensors.items()}
    (batch, time, _, keys), values = a.q.shape, a.v.shape[3]
    dstates = []
    for rows, start, stop in document_bounds(a.cu_seqlens, batch, time):
        if a.initial_state is None:
            shape = (batch, a.heads, keys, values)
            state = a.q.new_zeros(shape, dtype=a.dtype)
        else:
            state = a.initial_state[rows].to(a.dtype)
        dstate = None if dfinal is None else dfinal[rows].to(a.dtype)
        pieces = [slice(t, min(t + PIECE, stop)) for t in range(start, stop, PIECE)]
        states = [state]
        for piece in pieces[:-1]:
            states.append(_run(a, _cut(tensors, piece), states[-1])[1])
        # An empty document has a state but no pieces.
        for piece, state in zip(reversed(pieces), reversed(states), strict=False):
            dparts, dstate = _piece_backward(a, tensors, state, piece, do, dstate)
            for name, grad in dparts.items():
                if _by_token(tensors[name]):
                    grads[name][:, piece] = grad
                else:
                    grads[name] += grad
        dstates.append(torch.zeros_like(state) if dstate is None else dstate)
    if a.initial_state is not None:
        grads["initial_state"] = torch.cat(dstates).to(a.initial_state.dtype)
    return grads


def _piece_backward(
    a: LinearAttention,
    tensors: dict[str, Tensor],
    state: Tensor,
    piece: slice,
    do: Tensor,
    dstate: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of the tensors in a piece of time and of the state before it."""

    def outputs(parts: dict[str, Tensor], state: Tensor):
        o, after = _run(a, parts, state)
        # A final state without a gradient is left out: 0 times inf or NaN in it would be NaN.
        return o if dstate is None else (o, after)

    differentiate = torch.func.vjp(outputs, _cut(tensors, piece), state)[1]
    return differentiate(do[:, piece] if dstate is None else (do[:, piece], dstate))


def _tensors(a: LinearAttention) -> dict[str, Tensor]:
    """Return the floating tensors but for the states, by name."""
    return {name: x for name, x in a.floating().items() if name != "initial_state"}


def _by_token(x: Tensor) -> bool:
    """Whether a tensor has a row for each token, unlike (H,) and (H, K)."""
    return x.dim() > 2


def _cut(tensors: dict[str, Tensor], piece: slice) -> dict[str, Tensor]:
    return {name: x[:, piece] if _by_token(x) else x for name, x in tensors.items()}


def _run(a: LinearAttention, tensors: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the reference on a piece of one document, or of all rows of a batch."""
    return reference.linear_attention(a.replace(**tensors, initial_state=state, cu_seqlens=None))
