"""One token at a time: each op for T = 1 without gradients, in a handful of calls.

A call costs more than its arithmetic. Whatever depends on shapes and dtypes only is computed once,
when ``prepare`` makes a step for inputs of one form; ``backends.resolve`` caches the step. Nothing
the size of a state is allocated but the new state, and not even that with ``overwrite_state``.
These are plain tensor operations, which a compiler can fuse.

Shapes: B batch, H heads, K key dim, V value dim, D channels, N state size, W filter width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_kernels.arguments import Arguments, CausalConv1d, LinearAttention, SelectiveScan


def prepare(arguments: Arguments, overwrite_state: bool) -> Callable | None:
    """Return a function that computes an op for inputs of this form; None if not a single step.

    Args:
        arguments: of the op, validated.
        overwrite_state: whether to write the final state into the initial state.
    """
    step = _STEPS.get(arguments.OP)
    if step is None or not is_single_step(arguments):
        return None
    return step(arguments, overwrite_state).run


def is_single_step(arguments: Arguments) -> bool:
    """Whether this module applies: one token per row, and no gradients."""
    one = arguments.time == 1 and arguments.cu_seqlens is None
    return one and not arguments.needs_backward()


class LinearAttentionStep:
    """``linear_attention`` for one token, for inputs with the shapes and dtypes of these.

    Besides the output and, unless ``overwrite_state``, the new state, only rows are allocated: exp
    of the decay, and inputs that are cast or repeated.
    """

    def __init__(self, a: LinearAttention, overwrite_state: bool = False):
        q, k, v, log_decay = a.q, a.k, a.v, a.log_decay
        self.overwrite = overwrite_state
        self.batch, self.keys, self.values = q.shape[0], q.shape[3], v.shape[3]
        self.heads = a.heads
        self.rows = self.batch * self.heads
        self.dtype, self.output_dtype = a.dtype, v.dtype
        given = a.replace(bonus=None).floating().values()
        self.cast = any(x.dtype != self.dtype for x in given)
        self.grouped = any(x.shape[2] != self.heads for x in (q, k, v))
        # Numbers that decay one head: one, or one for each key.
        self.span = self.keys if log_decay is not None and log_decay.dim() == 4 else 1

    def run(self, a: LinearAttention) -> tuple[Tensor, Tensor]:
        """Return the output and the new state."""
        q, k, v, log_decay, value_log_decay = a.q, a.k, a.v, a.log_decay, a.value_log_decay
        beta, bonus, write_scale, scale = a.beta, a.bonus, a.write_scale, a.scale
        erase_key, erase_query = a.erase_key, a.erase_query
        initial_state = state = a.initial_state
        rows, keys, values = self.rows, self.keys, self.values
        if self.cast:
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
            given = (log_decay, value_log_decay, beta, write_scale, state)
            cast = (None if x is None else x.to(self.dtype) for x in given)
            log_decay, value_log_decay, beta, write_scale, state = cast
            if erase_key is not None:
                erase_key, erase_query = (x.to(self.dtype) for x in (erase_key, erase_query))
        if self.grouped:
            q, k, v = self._each_head(q), self._each_head(k), self._each_head(v)
        if state is None:
            state = q.new_zeros(self.batch, self.heads, keys, values)
        elif not state.is_contiguous():
            state = state.contiguous()
        query, value = q.reshape(rows, 1, keys), v.reshape(rows, 1, values)
        if write_scale is not None:
            value = value * write_scale.reshape(rows, 1, 1)
        if bonus is not None:
            before = state.view(rows, keys, values)
            # With beta = 0 the first argument only lends its shape.
            o = torch.baddbmm(value, query, before, beta=0, alpha=scale)
            own = (q * k * bonus).sum(-1)
            o.addcmul_(own.view(rows, 1, 1), value, value=scale)
        # May the state's memory be written?
        free = self.overwrite or state is not initial_state
        if log_decay is not None:
            factor = log_decay.exp().reshape(-1, self.heads, self.span, 1)
            state, free = state.mul_(factor) if free else state * factor, True
        if value_log_decay is not None:
            factor = value_log_decay.exp().reshape(-1, self.heads, 1, values)
            state, free = state.mul_(factor) if free else state * factor, True
        if not free:
            state = state.clone()
        after = state.view(rows, keys, values)
        if erase_key is not None:
            assert erase_query is not None
            # With beta = 0 the first argument only lends its shape.
            recalled = torch.baddbmm(value, erase_query.reshape(rows, 1, keys), after, beta=0)
            after.baddbmm_(erase_key.reshape(rows, keys, 1), recalled)
        if beta is None:
            after.baddbmm_(k.reshape(rows, keys, 1), value)
            if bonus is None:
                o = torch.baddbmm(value, query, after, beta=0, alpha=scale)
        else:
            key = k.reshape(rows, 1, keys)
            value = torch.baddbmm(value, key, after, alpha=-1) * beta.reshape(rows, 1, 1)
            after.baddbmm_(key.mT, value)
            # The written row is no longer needed; its memory takes the output.
            o = value.baddbmm_(query, after, beta=0, alpha=scale)
        o = o.view(self.batch, 1, self.heads, values)
        if self.overwrite and state is not initial_state:
            assert initial_state is not None
            state = initial_state.copy_(state)
        return _cast(o, self.output_dtype), state

    def _each_head(self, x: Tensor) -> Tensor:
        """Repeat (B, 1, heads of x, D) to (B, 1, H, D), as a view where there is one head."""
        own = x.shape[2]
        if own == self.heads:
            return x
        if own == 1:
            return x.expand(-1, -1, self.heads, -1)
        return x.unsqueeze(3).expand(-1, -1, -1, self.heads // own, -1).flatten(2, 3)


def linear_attention_step(a: LinearAttention) -> tuple[Tensor, Tensor]:
    """Compute ``linear_attention`` for one token; the initial state is left as it is."""
    return LinearAttentionStep(a).run(a)


class SelectiveScanStep:
    """``selective_scan`` for one token, for inputs with the dtypes of these."""

    def __init__(self, a: SelectiveScan, overwrite_state: bool = False):
        self.overwrite, initial_state = overwrite_state, a.initial_state
        self.dtype, self.output_dtype = a.dtype, a.u.dtype
        self.cast = any(x.dtype != self.dtype for x in (a.u, a.delta, a.A, a.B, a.C))
        # A state of another dtype cannot be computed in.
        self.in_place = (
            overwrite_state and initial_state is not None and initial_state.dtype == self.dtype
        )

    def run(self, a: SelectiveScan) -> tuple[Tensor, Tensor]:
        """Return the output and the new state."""
        u, delta, A, B, C, D, initial_state = a.u, a.delta, a.A, a.B, a.C, a.D, a.initial_state
        if self.cast:
            u, delta, A, B, C = (x.to(self.dtype) for x in (u, delta, A, B, C))
        # (B, 1, D) turned is (B, D, 1), and (B, 1, N) is what a row of the state is multiplied by.
        after = torch.mul(delta.mT, A).exp_()
        if initial_state is None:
            after.zero_()
        elif self.in_place:
            after = initial_state.mul_(after)
        else:
            after.mul_(initial_state)
        after.addcmul_((delta * u).mT, B)
        y = torch.bmm(C, after.mT)
        if D is not None:
            y.addcmul_(u, _cast(D, self.dtype))
        if self.overwrite and not self.in_place:
            assert initial_state is not None
            after = initial_state.copy_(after)
        return _cast(y, self.output_dtype), after


def selective_scan_step(a: SelectiveScan) -> tuple[Tensor, Tensor]:
    """Compute ``selective_scan`` for one token; the initial state is left as it is."""
    return SelectiveScanStep(a).run(a)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in a dtype; asking first is cheaper than a conversion that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def causal_conv1d_step(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Compute ``causal_conv1d`` for one token; the initial state is left as it is."""
    x, weight, bias, state, dtype = a.x, a.weight, a.bias, a.initial_state, a.dtype
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    window = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=2)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    if a.activation == "silu":
        y = torch.nn.functional.silu(y)
    return y[:, None].to(x.dtype), window[..., 1:]


_STEPS = {"linear_attention": LinearAttentionStep, "selective_scan": SelectiveScanStep}
