"""One call of ``linear_attention`` as the kernels see it, and how any of its kernels is launched.

Shapes: B batch, T time, H heads, K key dim, V value dim, C chunk, R chunks in all, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

import hybrid_kernels.triton.launch as shipped
from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.triton.launch import Config, block
from hybrid_kernels.triton.layout import Chunks, chunks


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
        self.device = self.q.device
        self.dot, self.precision = shipped.operands(self.device, self.q, self.k, self.v)
        self.stored = shipped.stored_dtype(self.q, self.k, self.v)
        # The gradient of gated delta's decay rests on the product of two states, which may cancel.
        whole = self.backward and self.delta and self.scalar
        self.stored_states = torch.float32 if whole else self.stored
        form = (self.delta, self.log_decay is not None, self.key_dim, self.stored)
        self.fine, self.parts = shipped.fine(*form, self.backward), shipped.inverse_parts(*form)

    @property
    def walks(self) -> bool:
        """Whether the forward pass is one walk over time; not with a decay over values.

        Outputs under a decay over values are computed level by level.
        """
        walkers = self.chunks.sequences * self.heads
        return not self.value and shipped.walks(self.device, walkers, self.key_dim, self.precision)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(B, T, H)."""
        return self.q.shape[0], self.q.shape[1], self.heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, K, V)."""
        return self.heads, self.key_dim, self.value_dim

    @property
    def pair_shape(self) -> tuple[int, int, int]:
        """(R * H, C, C)."""
        return self.programs, self.chunk, self.chunk

    @property
    def programs(self) -> int:
        """R * H, the programs of a kernel that has one for each head of each chunk."""
        return self.chunks.count * self.heads

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory, in ``stored`` unless a dtype is given."""
        return torch.empty(shape, dtype=dtype or self.stored, device=self.device)

    def like(self, x: Tensor) -> Tensor:
        """Return memory for the gradient of q, k or v per head of the state."""
        dtype = x.dtype if x.shape[2] == self.heads else torch.float32
        return self.empty(*self.tokens, x.shape[3], dtype=dtype)

    def sizes(self, kernel: str) -> tuple[Config, dict[str, int]]:
        """Return the configuration of a kernel and its blocks of K and V."""
        forms = {
            "wide_delta": self.delta and self.key_dim > 128,
            "fine": self.fine,
            "delta_vector": self.delta and self.vector,
            "delta": self.delta,
            "value": self.value,
            "vector": self.vector,
        }
        found = shipped.config(kernel, self.device, self.dot, forms)
        keys, values = block(self.key_dim, found.keys), block(self.value_dim, found.values)
        return found, {"BK": keys, "BV": values}

    def launch(
        self,
        kernel: Any,
        programs: int,
        config: Config,
        tensors: Mapping[str, Tensor | None],
        **constants: Any,
    ) -> None:
        """Launch a kernel of this folder; arguments are passed by the names of its parameters.

        Args:
            kernel: whose pointers are named ``p_<tensor>``.
            programs: size of the grid.
            config: of the kernel.
            tensors: by name, in addition to those of the call or in their place; for None, which
                this form of the kernel does not touch, any tensor is passed.
            constants: in addition to those of the call.
        """
        values: dict[str, Any] = {**self._numbers(), **self._constants(), **constants}
        given = {**self._tensors(), **tensors}
        for name, x in given.items():
            values[f"p_{name}"] = self.q if x is None else x
        for name in "qkv":
            values[f"H{name.upper()}"] = values[f"p_{name}"].shape[2]
        names = kernel.arg_names
        count = sum(name.startswith("p_") or name in self._numbers() for name in names)
        shipped.launch(
            kernel,
            (programs,),
            config,
            *[values[name] for name in names[:count]],
            **{name: values[name] for name in names[count:]},
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "g": self.log_decay,
            "value_g": self.value_log_decay,
            "beta": self.beta,
            "initial": self.initial_state,
            "offsets": self.chunks.offsets,
            "first": self.chunks.first,
            "owner": self.chunks.owner,
        }

    def _numbers(self) -> dict[str, float]:
        time, per_row = self.chunks.time, self.chunks.per_row
        rows = self.q.shape[0] * self.q.shape[1]
        return {"scale": self.scale, "T": time, "NT": per_row, "total_rows": rows}

    def _constants(self) -> dict[str, Any]:
        return {
            "H": self.heads,
            "K": self.key_dim,
            "V": self.value_dim,
            "C": self.chunk,
            "LEVELS": self.chunk.bit_length() - 1,
            "SCALAR": self.scalar,
            "VECTOR": self.vector,
            "VALUE": self.value,
            "DELTA": self.delta,
            "FINE": self.fine,
            "PARTS": self.parts,
            "INITIAL": self.initial_state is not None,
            "PACKED": self.chunks.packed,
            "DOT": self.dot,
            "PRECISION": self.precision,
        }


def chunk_inputs(a: LinearAttention, backward: bool = False) -> ChunkedInputs:
    """Bring the arguments of a call into the form in which kernels take them.

    A decay over keys is None, (B, T, H) or (B, T, H, K); (B, T, H) does not go with one over
    values.
    """
    assert a.chunk_size is not None
    optional = (a.log_decay, a.value_log_decay, a.beta, a.initial_state)
    decay, value_decay, beta, initial = (None if x is None else x.contiguous() for x in optional)
    q, k, v = a.q.contiguous(), a.k.contiguous(), a.v.contiguous()
    cut = chunks(q, a.cu_seqlens, a.chunk_size)
    return ChunkedInputs(
        q, k, v, decay, value_decay, beta, initial, a.scale, a.chunk_size, cut, backward
    )


def swap_kv(p: ChunkedInputs, do: Tensor) -> ChunkedInputs:
    """Return the call with (do, v, decay over values) in the place of (q, k, decay over keys).

    The loss, a sum over pairs of rows of q_i k_j do_i v_j and both decays, treats them alike.
    """
    return replace(p, q=do, k=p.v, v=p.k, log_decay=p.value_log_decay, value_log_decay=p.log_decay)


def tiles(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    return triton.cdiv(size, block)
