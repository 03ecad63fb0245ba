"""Launches of the forward kernels of ``linear_attention``; the backward pass repeats some.

Shapes: B batch, T time, H heads, K key dim, V value dim, C chunk, R chunks in all, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import hybrid_kernels.triton.launch as shipped
from hybrid_kernels.triton.fused_chunks import fused_chunk_forward_kernel
from hybrid_kernels.triton.inputs import ChunkedInputs, tiles
from hybrid_kernels.triton.launch import Config, block
from hybrid_kernels.triton.outputs import outputs_forward_kernel
from hybrid_kernels.triton.pairs import pairs_kernel
from hybrid_kernels.triton.states import states_forward_kernel


class DecayedRows(NamedTuple):
    """Queries and keys as the walk over time takes them, and what else a chunk's pairs give.

    Attributes:
        q, k: with a decay over keys, decayed from and to the chunk's ends, (B, T, H, K); else the
            inputs.
        erase: for the delta rule with a decay over keys, keys decayed from the chunk's start
            (B, T, H, K); else the keys.
        total: with a decay over keys, that of whole chunks (R, H, K); else the log decay itself.
        pairs: with a decay over keys, or for the walk of the delta rule, q_i^T k_j decayed,
            (R * H, C, C); else None.
        inverse: for the delta rule, that of I plus beta_i k_i^T k_j decayed, less I, in one or two
            parts (R * H, parts, C, C); else None.
    """

    q: Tensor
    k: Tensor
    erase: Tensor
    total: Tensor | None
    pairs: Tensor | None
    inverse: Tensor | None


def decay_rows(p: ChunkedInputs, inverse: Tensor | None = None, seen: bool = False) -> DecayedRows:
    """Decay rows and pairs of rows; compute the delta rule's inverse unless it is given.

    ``seen``: q is the gradient of an output, and its rows of zeros have no pairs.
    """
    solving = p.delta and inverse is None
    needs_pairs = p.vector or (solving and p.walks)
    rows = DecayedRows(p.q, p.k, p.k, p.log_decay, None, inverse)
    if p.vector:
        shape = (*p.tokens, p.key_dim)
        erase = p.empty(*shape) if p.delta else p.k
        total = p.empty(p.programs, p.key_dim, dtype=torch.float32)
        rows = rows._replace(q=p.empty(*shape), k=p.empty(*shape), erase=erase, total=total)
    if needs_pairs:
        rows = rows._replace(pairs=p.empty(*p.pair_shape))
    if solving:
        rows = rows._replace(inverse=p.empty(p.programs, p.parts, p.chunk, p.chunk))
    if not (p.vector or solving):
        return rows
    config, sizes = p.sizes("pairs")
    written = {"read": rows.q, "write": rows.k, "erase": rows.erase, "total": rows.total}
    p.launch(
        pairs_kernel,
        p.programs,
        config,
        {"pairs": rows.pairs, "inverse": rows.inverse, **written},
        INVERSE=solving,
        PAIRS=needs_pairs,
        SEEN=seen,
        EXACT=shipped.exact(p.device),
        **sizes,
    )
    return rows


def fused_chunk_forward(p: ChunkedInputs, rows: DecayedRows) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, V) and the final states (N, H, K, V)."""
    o = p.empty(*p.tokens, p.value_dim, dtype=p.v.dtype)
    final = p.empty(p.chunks.sequences, *p.state_shape, dtype=torch.float32)
    config, sizes = p.sizes("fused_chunk_forward")
    sizes["BK"] = block(p.key_dim, shipped.WALK_KEYS)
    programs = p.chunks.sequences * p.heads * tiles(p.value_dim, sizes["BV"])
    tensors = {**rows._asdict(), "o": o, "final": final}
    p.launch(fused_chunk_forward_kernel, programs, config, tensors, **sizes)
    return o, final


def state_sizes(p: ChunkedInputs, kernel: str) -> tuple[Config, dict[str, int], int]:
    """Return configuration, blocks and programs of a walk over states."""
    config, sizes = p.sizes(kernel)
    if p.delta:
        sizes["BK"] = block(p.key_dim, 256)
    count = tiles(p.value_dim, sizes["BV"]) * tiles(p.key_dim, sizes["BK"])
    return config, sizes, p.chunks.sequences * p.heads * count


class ChunkStates(NamedTuple):
    """What the walk over states returns.

    Attributes:
        states: before each chunk (R, H, K, V).
        final: (N, H, K, V).
        written: u (B, T, H, V) for the delta rule, else v.
    """

    states: Tensor
    final: Tensor
    written: Tensor


def states_forward(p: ChunkedInputs, rows: DecayedRows) -> ChunkStates:
    """Walk the states through the chunks."""
    u = p.empty(*p.tokens, p.value_dim) if p.delta else p.v
    states = p.empty(p.chunks.count, *p.state_shape, dtype=p.stored_states)
    final = p.empty(p.chunks.sequences, *p.state_shape, dtype=torch.float32)
    config, sizes, programs = state_sizes(p, "states_forward")
    reads = {"k": rows.k, "g": rows.total, "erase": rows.erase, "inverse": rows.inverse}
    tensors = {**reads, "u": u, "states": states, "final": final}
    p.launch(states_forward_kernel, programs, config, tensors, **sizes)
    return ChunkStates(states, final, u)


def outputs_forward(p: ChunkedInputs, rows: DecayedRows, s: ChunkStates) -> Tensor:
    """Return o (B, T, H, V) in the dtype of v."""
    o = p.empty(*p.tokens, p.value_dim, dtype=p.v.dtype)
    config, sizes = p.sizes("outputs_forward")
    tensors = {"q": rows.q, "k": rows.k, "v": s.written, "pairs": rows.pairs}
    programs = p.programs * tiles(p.value_dim, sizes["BV"])
    tensors = {**tensors, "states": s.states, "o": o}
    p.launch(outputs_forward_kernel, programs, config, tensors, **sizes)
    return o
