"""Launches of the backward kernels of ``linear_attention``.

Shapes: B batch, T time, H heads, K key dim, V value dim, C chunk, R chunks in all, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.triton.forward import DecayedRows, state_sizes
from hybrid_kernels.triton.inputs import ChunkedInputs, tiles
from hybrid_kernels.triton.keys import keys_backward_kernel
from hybrid_kernels.triton.outputs import values_backward_kernel
from hybrid_kernels.triton.pairs import pairs_backward_kernel
from hybrid_kernels.triton.states import states_backward_kernel


def states_backward(
    p: ChunkedInputs,
    rows: DecayedRows,
    do: Tensor,
    dfinal: Tensor,
    dv: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states after each chunk and of the initial ones.

    Args:
        p: the call.
        rows: decayed.
        do: gradient of the output (B, T, H, V).
        dfinal: gradient of the final states (N, H, K, V).
        dv: for the delta rule, to be filled with the gradient of v.
        dx: for the delta rule, the gradient of u so far; becomes that of its second read.
    """
    dstates = p.empty(p.chunks.count, *p.state_shape, dtype=p.stored_states)
    dinitial = torch.empty_like(dfinal)
    config, sizes, programs = state_sizes(p, "states_backward")
    reads = {"q": rows.q, "k": rows.k, "g": rows.total, "erase": rows.erase}
    grads = {"do": do, "dx": dx, "dv": dv, "dfinal": dfinal, "dinitial": dinitial}
    tensors = {**reads, "inverse": rows.inverse, "dstates": dstates, **grads}
    p.launch(states_backward_kernel, programs, config, tensors, **sizes)
    return dstates, dinitial


def values_backward(
    p: ChunkedInputs, rows: DecayedRows, do: Tensor, dv: Tensor, dstates: Tensor | None
) -> None:
    """Fill dv (B, T, H, V) with the gradient of what the additive form writes."""
    config, sizes = p.sizes("values_backward")
    tensors = {"q": rows.q, "k": rows.k, "pairs": rows.pairs, "do": do, "dv": dv}
    p.launch(
        values_backward_kernel,
        p.programs * tiles(p.value_dim, sizes["BV"]),
        config,
        {**tensors, "dstates": dstates},
        STATES=dstates is not None,
        **sizes,
    )


class ValueSide(NamedTuple):
    """What ``keys_backward`` needs of the values' side.

    Attributes:
        v, do: (B, T, heads, V) and (B, T, H, V), with a decay over values decayed to and from the
            chunk's ends; for the delta rule v is u.
        dpairs: gradient of each pair of rows (R * H, C, C).
        dstrict, dx: for the delta rule, the like of dpairs and do for its second read.
        dg: with a scalar decay, its gradient (B, T, H) from pairs of rows.
        dbeta: for the delta rule, its gradient (B, T, H) from v.
        total: decay over values of whole chunks (R, H, V), or None.
        swapped: whether keys and values have changed places, all but the states.
    """

    v: Tensor
    do: Tensor
    dpairs: Tensor
    dstrict: Tensor | None = None
    dx: Tensor | None = None
    dg: Tensor | None = None
    dbeta: Tensor | None = None
    total: Tensor | None = None
    swapped: bool = False


def pairs_backward(p: ChunkedInputs, u: Tensor, do: Tensor, dx: Tensor | None = None) -> ValueSide:
    """Return the gradients of both kinds of pairs, with the rows they were computed from.

    Args:
        p: the call.
        u: what is written, (B, T, H, V) for the delta rule, else v.
        do: gradient of the output (B, T, H, V).
        dx: for the delta rule, that of its second read.
    """
    dpairs = p.empty(*p.pair_shape)
    dstrict = p.empty(*p.pair_shape) if p.delta else None
    dg = p.empty(*p.tokens, dtype=torch.float32) if p.scalar else None
    dbeta = p.empty(*p.tokens, dtype=torch.float32) if p.delta else None
    config, sizes = p.sizes("pairs_backward")
    grads = {"dpairs": dpairs, "dstrict": dstrict, "dg": dg, "dbeta": dbeta}
    tensors = {"do": do, "u": u, "dx": dx, **grads}
    p.launch(pairs_backward_kernel, p.programs, config, tensors, **sizes)
    return ValueSide(u, do, dpairs, dstrict, dx, dg, dbeta)


class KeyGradients(NamedTuple):
    """Gradients of q and k (B, T, H, K), of the decay in its shape, and of beta (B, T, H)."""

    q: Tensor
    k: Tensor
    decay: Tensor | None
    beta: Tensor | None


def keys_backward(
    p: ChunkedInputs, states: Tensor, dstates: Tensor, across: ValueSide
) -> KeyGradients:
    """Return the gradients of the keys' side."""
    config, sizes = p.sizes("keys_backward")
    blocks = tiles(p.key_dim, sizes["BK"])
    dq, dk, dg, dbeta = p.like(p.q), p.like(p.k), None, None
    if p.vector:
        dg = p.empty(*p.tokens, p.key_dim, dtype=torch.float32)
    if p.scalar:
        dg = p.empty(blocks, *p.tokens, dtype=torch.float32)
    if p.delta:
        dbeta = p.empty(blocks, *p.tokens, dtype=torch.float32)
    reads = {"states": states, "dstates": dstates, "v": across.v, "do": across.do}
    reads |= {"dx": across.dx, "dpairs": across.dpairs, "dstrict": across.dstrict}
    p.launch(
        keys_backward_kernel,
        p.programs * blocks,
        config,
        {**reads, "total": across.total, "dq": dq, "dk": dk, "dg": dg, "dbeta": dbeta},
        TOTAL=across.total is not None,
        SWAPPED=across.swapped,
        **sizes,
    )
    if dg is not None and across.dg is not None:
        dg = dg.sum(0).add_(across.dg)
    if dbeta is not None and across.dbeta is not None:
        dbeta = dbeta.sum(0).add_(across.dbeta)
    return KeyGradients(dq, dk, dg, dbeta)
