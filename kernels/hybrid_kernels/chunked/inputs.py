"""The inputs of the chunked op, cut into chunks, and the choice of algorithm and chunk size.

Shapes: B batch, T time, H heads, G heads of q and k, r value heads per G, C chunk, b chunks x G of
one span, K key dim, V value dim, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hybrid_kernels.arguments import LinearAttention
from hybrid_kernels.chunked.chunk_plan import ChunkPlan, chunk_plan
from hybrid_kernels.chunked.gates import RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN, Gate
from hybrid_kernels.chunked.memory import load
from hybrid_kernels.chunked.sizes import SMALLEST_CHUNK, first_chunk, span_size
from hybrid_kernels.custom_ops import Wanted
from hybrid_kernels.packing import documents


@dataclass(frozen=True)
class InputChunks:
    """Inputs in chunks: views of (leading, sequences, G, C, ...), see ``ChunkPlan``.

    Attributes:
        q: (..., K).
        k: (..., K).
        v: (..., r, V).
        key_decay: (..., K or 1), or None.
        value_decay: (..., r, V or 1), or None.
        beta: (..., 1), or None for the additive form; with beta, r is 1.
        bonus: (G, K), or None; with a bonus, r is 1.
        write_scale: (..., r, 1), or None; a factor on values.
        erase_key, erase_query: (..., K), or None; with them, r is 1.
        scale: of the output.
        exact: whether pairs decay in the exact way (``gates.py``).
        plan: of the chunks.
        dtype: to compute in.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_decay: Tensor | None
    value_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    write_scale: Tensor | None
    erase_key: Tensor | None
    erase_query: Tensor | None
    scale: float
    exact: bool
    plan: ChunkPlan
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """G, the heads of q and k."""
        return self.q.shape[2]

    @property
    def erases(self) -> bool:
        """Whether what a row writes depends on the state (``LinearAttention.erases``)."""
        return self.beta is not None or self.erase_key is not None

    @property
    def state_shape(self) -> tuple[int, int]:
        """(K, r V)."""
        return self.k.shape[4], self.v.shape[4] * self.v.shape[5]

    @property
    def exact_keys(self) -> bool:
        """Whether the decay over keys is applied to pairs in the exact way."""
        return self.exact and self.key_decay is not None

    @property
    def exact_values(self) -> bool:
        """Whether the decay over values is applied to pairs in the exact way."""
        return self.exact and self.value_decay is not None

    @cached_property
    def fixed_decay(self) -> bool:
        """Whether no decay depends on the token, so that all spans of one shape have the same."""
        decays = [g for g in (self.key_decay, self.value_decay) if g is not None]
        return all(g.shape[-1] == 1 and g.stride(0) == 0 for g in decays)

    @cached_property
    def scale_tensor(self) -> Tensor:
        """The scale as (1,): a Python number would round a product to bfloat16 first."""
        return self.q.new_full((1,), self.scale, dtype=self.dtype)

    @cached_property
    def _all_beta(self) -> Tensor:
        assert self.beta is not None
        return load(self.beta, self.dtype)

    def span_beta(self, lead: slice) -> Tensor:
        """Return beta in a span, (b, C, 1)."""
        rows = self.q.shape[1] * self.heads
        return self._all_beta[lead.start * rows : lead.stop * rows]

    def key_gate(self, lead: slice) -> Gate | None:
        """Return the gate over keys in a span, (b, C, K or 1)."""
        return self._gate("key", self.key_decay, lead, self.bonus is not None, 1.0)

    def value_gate(self, lead: slice) -> Gate | None:
        """Return the gate over values in a span, (b, C, r V or r)."""
        return self._gate("value", self.value_decay, lead, False, self.scale)

    def _gate(
        self, name: str, decay: Tensor | None, lead: slice, exclusive: bool, scale: float
    ) -> Gate | None:
        if decay is None:
            return None
        if decay.shape[-1] > 1:
            return Gate(load(decay[lead], self.dtype).flatten(2), self.exact, exclusive, scale)
        # A decay that is fixed per head (and expanded) is the same in every span of one length.
        fixed = decay.stride(0) == 0
        key = (name, lead.stop - lead.start if fixed else lead.start)
        if key not in self._scalar_gates:
            # One number per row is little memory: computed for all chunks at once, then split.
            part = decay[lead] if fixed else decay
            gate = Gate(load(part, self.dtype).flatten(2), self.exact, exclusive, scale)
            if fixed:
                self._scalar_gates[key] = gate
            else:
                self._split(name, gate)
        return self._scalar_gates[key]

    def _split(self, name: str, gate: Gate) -> None:
        leads = [span.lead for span in self.plan.spans]
        rows = gate.g.shape[0] // leads[-1].stop
        parts = gate.split([rows * (lead.stop - lead.start) for lead in leads])
        for lead, part in zip(leads, parts, strict=True):
            self._scalar_gates[name, lead.start] = part

    @cached_property
    def _scalar_gates(self) -> dict[tuple[str, int], Gate]:
        return {}


def cut_inputs(a: LinearAttention, wanted: Wanted) -> InputChunks:
    """Choose the algorithm and the chunk size, and cut the inputs into chunks.

    Args:
        a: the arguments.
        wanted: names of the inputs whose gradients will be wanted.
    """
    (batch, time), heads, value_decay = a.q.shape[:2], a.heads, a.value_log_decay
    log_decay = a.log_decay
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, time, heads)
    plan, exact = _choose(a, [g for g in (log_decay, value_decay) if g is not None], wanted)
    # A scalar decay goes with the values, so that heads can share queries and keys; but pairs of
    # rows decay on the key side where they do so exactly.
    key_decay = log_decay
    if log_decay is not None and log_decay.dim() == 3:
        key_decay = log_decay[..., None]
        apart = a.bonus is not None or a.erase_key is not None
        if not (exact or apart or value_decay is not None):
            key_decay, value_decay = None, key_decay
    share = (
        all(x is None for x in (a.beta, a.bonus, a.erase_key, key_decay))
        and a.q.shape[2] == a.k.shape[2]
    )
    groups = a.q.shape[2] if share else heads

    def cut(x: Tensor | None, *shared: int) -> Tensor | None:
        """Cut (B, T, any heads, ...) into chunks of G, or G x ``shared``, heads."""
        if x is None:
            return None
        if x.shape[2] < groups:
            x = x.repeat_interleave(heads // x.shape[2], dim=2)
        return plan.chunks(x.unflatten(2, (groups, *shared))).transpose(2, 3)

    def column(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., None]

    q, k, v = cut(a.q), cut(a.k), cut(a.v, -1)
    assert q is not None
    assert k is not None
    assert v is not None
    return InputChunks(
        q=q,
        k=k,
        v=v,
        key_decay=cut(key_decay),
        value_decay=cut(value_decay, -1),
        beta=cut(column(a.beta)),
        bonus=a.bonus,
        write_scale=cut(column(a.write_scale), -1),
        erase_key=cut(a.erase_key),
        erase_query=cut(a.erase_query),
        scale=a.scale,
        exact=exact,
        plan=plan,
        dtype=a.dtype,
    )


def _choose(a: LinearAttention, decays: list[Tensor], wanted: Wanted) -> tuple[ChunkPlan, bool]:
    """Halve the chunk until rescaling is safe; return the plan and whether to decay exactly."""
    time = a.q.shape[1]
    packed = None if a.cu_seqlens is None else documents(a.cu_seqlens, time)
    longest = time if packed is None else max(packed.lengths)
    chunk, span = first_chunk(a, longest), span_size(a, training=bool(wanted))
    first = plan = chunk_plan(a.q, chunk, span, packed)
    while decays and not _bounded([plan.chunks(g) for g in decays], longest):
        if chunk <= SMALLEST_CHUNK:
            return first, True
        chunk //= 2
        plan = chunk_plan(a.q, chunk, span, packed)
    # The gradient of a decay that is fixed per head is a sum over all tokens of terms of either
    # sign, in which the rounding of rescaled ones would show.
    exact = "log_decay" in wanted and a.log_decay is not None and a.log_decay.dim() == 1
    return plan, exact


def _bounded(decays: list[Tensor], longest: int) -> bool:
    """Whether every chunk's total log decay stays above the limits; NaN counts as not.

    The decays over keys and over values add up: what is written has been divided by both.
    """
    if decays[0].numel() == 0:
        return True
    limit = max(RESCALE_LIMIT, RESCALE_LIMIT_PER_TOKEN * min(decays[0].shape[2], longest))
    # A decay that is fixed per head (and expanded) is the same in every chunk.
    decays = [g[:1] if g.stride(0) == 0 else g for g in decays]
    lowest = torch.stack([g.sum(2, dtype=torch.float32).amin() for g in decays])
    return bool(lowest.sum() >= limit)
