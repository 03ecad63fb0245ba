"""One call of ``linear_attention`` as the kernels see it, and the launch of each kernel.

Legend: B batch, T time, H heads, K key dim, V value dim, C chunk, R chunks in all, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hybrid_kernels.triton import launch as shipped
from hybrid_kernels.triton.fused_chunks import fused_chunk_forward_kernel
from hybrid_kernels.triton.keys import keys_backward_kernel
from hybrid_kernels.triton.launch import Config, block, launch
from hybrid_kernels.triton.layout import Chunks, chunks
from hybrid_kernels.triton.outputs import outputs_forward_kernel, values_backward_kernel
from hybrid_kernels.triton.pairs import pairs_backward_kernel, pairs_kernel
from hybrid_kernels.triton.states import states_backward_kernel, states_forward_kernel


class Inputs(NamedTuple):
    """What both custom ops take, in this order; the names are those of ``linear_attention``.

    A decay over keys is None, (B, T, H) or (B, T, H, K); (B, T, H) does not go with one over
    values.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    value_log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    chunk: int

    def differentiable(self) -> list[tuple[str, Tensor]]:
        """Return the names and values of the tensors that have a gradient, in order."""
        found = self._asdict().items()
        return [(n, x) for n, x in found if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass
class ChunkedInputs:
    """One call with contiguous inputs, and what follows from their form."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    value_log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    scale: float
    chunk: int
    chunks: Chunks
    backward: bool = False

    def __post_init__(self):
        self.heads = max(x.shape[2] for x in (self.q, self.k, self.v))
        self.key_dim, self.value_dim = self.q.shape[3], self.v.shape[3]
        self.delta = self.beta is not None
        self.vector = self.log_decay is not None and self.log_decay.dim() == 4
        self.scalar = self.log_decay is not None and not self.vector
        self.value = self.value_log_decay is not None
        self.g = _or(self.log_decay, self.q)
        self.value_g = _or(self.value_log_decay, self.q)
        self.device = self.q.device
        self.dot, self.precision = shipped.operands(self.device, self.q, self.k, self.v)
        self.stored = shipped.stored_dtype(self.q, self.k, self.v)
        # The gradient of gated delta's decay rests on the product of two states, which may cancel.
        whole = self.backward and self.delta and self.scalar
        self.stored_states = torch.float32 if whole else self.stored
        self.counts = (self.chunks.time, self.chunks.per_row)
        form = (self.delta, self.log_decay is not None, self.key_dim, self.stored)
        fine, self.parts = shipped.fine(*form, self.backward), shipped.inverse_parts(*form)
        self.decays = {"SCALAR": self.scalar, "VECTOR": self.vector}
        self.rule = {"DELTA": self.delta, "FINE": fine, "PARTS": self.parts}
        self.forms = {**self.decays, **self.rule, "VALUE": self.value}
        self.common = {
            "H": self.heads,
            "C": self.chunk,
            "PACKED": self.chunks.packed,
            "DOT": self.dot,
            "PRECISION": self.precision,
        }

    @property
    def levels(self) -> int:
        """Levels of split points in a chunk."""
        return self.chunk.bit_length() - 1

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory, in ``stored`` unless told otherwise."""
        return torch.empty(shape, dtype=dtype or self.stored, device=self.device)

    def like(self, x: Tensor) -> Tensor:
        """Return memory for the gradient of q, k or v per head of the state."""
        dtype = x.dtype if x.shape[2] == self.heads else torch.float32
        return self.empty(*x.shape[:2], self.heads, x.shape[3], dtype=dtype)

    def sizes(self, kernel: str) -> tuple[Config, dict[str, int]]:
        """Return the configuration of a kernel and its blocks of K and V."""
        forms = {
            "wide_delta": self.delta and self.key_dim > 128,
            "fine": self.rule["FINE"],
            "delta_vector": self.delta and self.vector,
            "delta": self.delta,
            "value": self.value,
            "vector": self.vector,
        }
        found = shipped.config(kernel, self.device, self.dot, forms)
        keys, values = block(self.key_dim, found.keys), block(self.value_dim, found.values)
        sizes = {"K": self.key_dim, "V": self.value_dim, "BK": keys, "BV": values}
        return found, sizes

    def per_chunk(self) -> int:
        """Programs of a kernel that has one for each head of each chunk."""
        return self.chunks.count * self.heads


def chunk_inputs(inputs: Inputs, backward: bool = False) -> ChunkedInputs:
    """Bring the inputs of a call into the form in which kernels take them."""
    q, k, v, *optional, cu_seqlens, scale, chunk = inputs
    g, value_g, beta, initial = (None if x is None else x.contiguous() for x in optional)
    q, k, v, cut = q.contiguous(), k.contiguous(), v.contiguous(), chunks(q, cu_seqlens, chunk)
    return ChunkedInputs(q, k, v, g, value_g, beta, initial, scale, chunk, cut, backward)


def swap_kv(p: ChunkedInputs, do: Tensor) -> ChunkedInputs:
    """Return the problem with (do, v, decay over values) in the place of (q, k, decay over keys).

    The loss, a sum over pairs of rows of q_i k_j do_i v_j and both decays, treats them alike.
    """
    return replace(p, q=do, k=p.v, v=p.k, log_decay=p.value_log_decay, value_log_decay=p.log_decay)


@dataclass(frozen=True)
class Rows:
    """Queries and keys as the walk over time takes them, and what else a chunk's pairs give.

    Attributes:
        q, k: with a decay over keys, decayed from and to the chunk's ends, (B, T, H, K); else the
            inputs.
        total: with a decay over keys, that of whole chunks (R, H, K); else the log decay itself.
        pairs: with a decay over keys, or for the walk of the delta rule, q_i^T k_j decayed,
            (R * H, C, C); else a dummy.
        inverse: for the delta rule, that of I plus beta_i k_i^T k_j decayed, less I, in one or two
            parts (R * H, parts, C, C); else a dummy.
        erase: for the delta rule with a decay over keys, keys decayed from the chunk's start
            (B, T, H, K); else the keys.
    """

    q: Tensor
    k: Tensor
    erase: Tensor
    total: Tensor
    pairs: Tensor
    inverse: Tensor


def make_rows(p: ChunkedInputs, inverse: Tensor | None = None) -> Rows:
    """Decay rows and pairs of rows; make the delta rule's inverse unless it is ``inverse``."""
    square = (p.per_chunk(), p.chunk, p.chunk)
    solving = p.delta and inverse is None
    needs_pairs = p.vector or (solving and walks(p))
    rows = Rows(p.q, p.k, p.k, p.g, p.q, _or(inverse, p.q))
    if p.vector:
        tokens = (*p.q.shape[:2], p.heads, p.key_dim)
        total = p.empty(p.per_chunk(), p.key_dim, dtype=torch.float32)
        erase = p.empty(*tokens) if p.delta else p.k
        rows = replace(rows, q=p.empty(*tokens), k=p.empty(*tokens), erase=erase, total=total)
    if needs_pairs:
        rows = replace(rows, pairs=p.empty(*square))
    if solving:
        rows = replace(rows, inverse=p.empty(p.per_chunk(), p.parts, p.chunk, p.chunk))
    if not (p.vector or solving):
        return rows
    config, sizes = p.sizes("pairs")
    launch(
        pairs_kernel,
        (p.per_chunk(),),
        config,
        *(p.q, p.k, p.g, _or(p.beta, p.q), rows.pairs, rows.inverse),
        *(rows.q, rows.k, rows.erase, rows.total),
        *p.chunks.tables,
        *p.counts,
        HQ=p.q.shape[2],
        HK=p.k.shape[2],
        K=sizes["K"],
        BK=sizes["BK"],
        LEVELS=p.levels,
        INVERSE=solving,
        PAIRS=needs_pairs,
        EXACT=shipped.exact(p.device),
        DELTA=p.delta,
        PARTS=p.parts,
        **p.decays,
        **p.common,
    )
    return rows


def walks(p: ChunkedInputs) -> bool:
    """Say whether the forward pass is one walk; a decay over values needs outputs level by level."""
    walkers = p.chunks.sequences * p.heads
    return not p.value and shipped.walks(p.device, walkers, p.key_dim, p.precision)


def fused_chunk_forward(p: ChunkedInputs, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, V) and the final states (N, H, K, V)."""
    o = p.empty(*p.q.shape[:2], p.heads, p.value_dim, dtype=p.v.dtype)
    shape = (p.chunks.sequences, p.heads, p.key_dim, p.value_dim)
    final = p.empty(*shape, dtype=torch.float32)
    config, sizes = p.sizes("fused_chunk_forward")
    sizes["BK"] = block(p.key_dim, shipped.WALK_KEYS)
    launch(
        fused_chunk_forward_kernel,
        (p.chunks.sequences * p.heads * triton.cdiv(p.value_dim, sizes["BV"]),),
        config,
        *(rows.q, rows.k, p.v, p.g, rows.total, rows.erase, _or(p.beta, p.q), rows.inverse),
        *(rows.pairs, _or(p.initial_state, p.q), o, final),
        *p.chunks.tables[:2],
        p.scale,
        *p.counts,
        HQ=rows.q.shape[2],
        HK=rows.k.shape[2],
        HV=p.v.shape[2],
        INITIAL=p.initial_state is not None,
        **p.rule,
        **sizes,
        **p.decays,
        **p.common,
    )
    return o, final


def _state_sizes(
    p: ChunkedInputs, direction: str
) -> tuple[Config, dict[str, int], tuple[int, ...]]:
    config, sizes = p.sizes(f"states_{direction}")
    if p.delta:
        sizes["BK"] = block(p.key_dim, 256)
    tiles = triton.cdiv(p.value_dim, sizes["BV"]) * triton.cdiv(p.key_dim, sizes["BK"])
    return config, sizes, (p.chunks.sequences * p.heads * tiles,)


def states_forward(p: ChunkedInputs, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before each chunk (R, H, K, V), the final ones, and what is written to them.

    That is u (B, T, H, V) for the delta rule, else v.
    """
    u = p.empty(*p.q.shape[:2], p.heads, p.value_dim) if p.delta else p.v
    states = p.empty(p.chunks.count, p.heads, p.key_dim, p.value_dim, dtype=p.stored_states)
    shape = (p.chunks.sequences, p.heads, p.key_dim, p.value_dim)
    final = p.empty(*shape, dtype=torch.float32)
    config, sizes, grid = _state_sizes(p, "forward")
    launch(
        states_forward_kernel,
        grid,
        config,
        *(rows.k, p.v, rows.total, p.value_g, rows.erase, _or(p.beta, p.q), rows.inverse, u),
        *(_or(p.initial_state, p.q), states, final),
        *p.chunks.tables[:2],
        *p.counts,
        HK=rows.k.shape[2],
        HV=p.v.shape[2],
        INITIAL=p.initial_state is not None,
        **sizes,
        **p.forms,
        **p.common,
    )
    return states, final, u


def states_backward(
    p: ChunkedInputs, rows: Rows, do: Tensor, dv: Tensor, dx: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the states after each chunk and of the initial ones.

    For the delta rule, fills dv and turns du so far into dx; else both are dummies.
    """
    dstates = p.empty(p.chunks.count, p.heads, p.key_dim, p.value_dim, dtype=p.stored_states)
    dinitial = torch.empty_like(dfinal)
    config, sizes, grid = _state_sizes(p, "backward")
    launch(
        states_backward_kernel,
        grid,
        config,
        *(rows.q, rows.k, rows.total, p.value_g, rows.erase, _or(p.beta, p.q), rows.inverse),
        *(do, dx, dv, dfinal, dstates, dinitial),
        *p.chunks.tables[:2],
        p.scale,
        *p.counts,
        HQ=rows.q.shape[2],
        HK=rows.k.shape[2],
        **sizes,
        **p.forms,
        **p.common,
    )
    return dstates, dinitial


def outputs_forward(p: ChunkedInputs, rows: Rows, v: Tensor, states: Tensor) -> Tensor:
    """Return o (B, T, H, V) in the dtype of v."""
    o = p.empty(*p.q.shape[:2], p.heads, p.value_dim, dtype=p.v.dtype)
    config, sizes = p.sizes("outputs_forward")
    launch(
        outputs_forward_kernel,
        (p.per_chunk() * triton.cdiv(p.value_dim, sizes["BV"]),),
        config,
        *(rows.q, rows.k, v, p.g, p.value_g, rows.pairs, states, o),
        *p.chunks.tables,
        p.scale,
        *p.counts,
        HQ=rows.q.shape[2],
        HK=rows.k.shape[2],
        HV=v.shape[2],
        LEVELS=p.levels,
        VALUE=p.value,
        **sizes,
        **p.decays,
        **p.common,
    )
    return o


def values_backward(
    p: ChunkedInputs, rows: Rows, do: Tensor, dv: Tensor, dstates: Tensor | None
) -> None:
    """Fill dv (B, T, H, V) with the gradient of what the additive form writes."""
    config, sizes = p.sizes("values_backward")
    launch(
        values_backward_kernel,
        (p.per_chunk() * triton.cdiv(p.value_dim, sizes["BV"]),),
        config,
        *(rows.q, rows.k, p.g, rows.pairs, do if dstates is None else dstates, do, dv),
        *p.chunks.tables,
        p.scale,
        *p.counts,
        HQ=rows.q.shape[2],
        HK=rows.k.shape[2],
        STATES=dstates is not None,
        **sizes,
        **p.decays,
        **p.common,
    )


@dataclass(frozen=True)
class Across:
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


def pairs_backward(p: ChunkedInputs, u: Tensor, do: Tensor, dx: Tensor | None = None) -> Across:
    """Return the gradients of both kinds of pairs, with what they were made of.

    Args:
        p: the call.
        u: what is written, (B, T, H, V) for the delta rule, else v.
        do: gradient of the output (B, T, H, V).
        dx: for the delta rule, that of its second read.
    """
    square = (p.per_chunk(), p.chunk, p.chunk)
    dpairs = p.empty(*square)
    dstrict = p.empty(*square) if p.delta else None
    numbers = (*p.q.shape[:2], p.heads)
    dg = p.empty(*numbers, dtype=torch.float32) if p.scalar else None
    dbeta = p.empty(*numbers, dtype=torch.float32) if p.delta else None
    config, sizes = p.sizes("pairs_backward")
    launch(
        pairs_backward_kernel,
        (p.per_chunk(),),
        config,
        *(p.q, p.k, p.g, _or(p.beta, p.q), do, u, p.v, _or(dx, do)),
        *(dpairs, _or(dstrict, dpairs), _or(dg, do), _or(dbeta, do)),
        *p.chunks.tables,
        p.scale,
        *p.counts,
        HQ=p.q.shape[2],
        HK=p.k.shape[2],
        HV=p.v.shape[2],
        SCALAR=p.scalar,
        DELTA=p.delta,
        **sizes,
        **p.common,
    )
    return Across(u, do, dpairs, dstrict, dx, dg, dbeta)


def _or(x: Tensor | None, dummy: Tensor) -> Tensor:
    """Return a tensor that a kernel takes but in this form does not touch."""
    return dummy if x is None else x


def keys_backward(
    p: ChunkedInputs, states: Tensor, dstates: Tensor, across: Across
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk (B, T, H, K), dg in the shape of the decay, and dbeta (B, T, H)."""
    config, sizes = p.sizes("keys_backward")
    blocks = triton.cdiv(p.key_dim, sizes["BK"])
    tokens = (*p.q.shape[:2], p.heads)
    dq, dk, dg, dbeta = p.like(p.q), p.like(p.k), None, None
    if p.vector:
        dg = p.empty(*tokens, p.key_dim, dtype=torch.float32)
    if p.scalar:
        dg = p.empty(blocks, *tokens, dtype=torch.float32)
    if p.delta:
        dbeta = p.empty(blocks, *tokens, dtype=torch.float32)
    launch(
        keys_backward_kernel,
        (p.per_chunk() * blocks,),
        config,
        *(p.q, p.k, across.v, p.g, _or(p.beta, p.q), states, dstates),
        *(across.do, _or(across.dx, p.q), across.dpairs, _or(across.dstrict, p.q)),
        *(_or(across.total, p.q), dq, dk, _or(dg, dq), _or(dbeta, dq)),
        *p.chunks.tables,
        p.scale,
        *(*p.counts, p.q.shape[0] * p.q.shape[1]),
        HQ=p.q.shape[2],
        HK=p.k.shape[2],
        HV=across.v.shape[2],
        LEVELS=p.levels,
        DELTA=p.delta,
        TOTAL=across.total is not None,
        TURNED=across.swapped,
        **sizes,
        **p.decays,
        **p.common,
    )
    if dg is not None and across.dg is not None:
        dg = dg.sum(0).add_(across.dg)
    if dbeta is not None and across.dbeta is not None:
        dbeta = dbeta.sum(0).add_(across.dbeta)
    return dq, dk, dg, dbeta
