"""mLSTM: a matrix memory with an exponential or sigmoid input gate (xLSTM, arXiv 2405.04517).

Shapes: B batch, T time, N documents, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from hybrid.config.declare import NotNegative, Positive, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import GroupedLayerNorm, HeadOptions, to_float32, value_parts
from hybrid.nn.past import Slot, StateSpec
from hybrid_kernels import linear_attention


@dataclass(frozen=True)
class MLSTMOptions(HeadOptions):
    """Options of ``mlstm``.

    Attributes:
        num_heads: H; default D / 128, at least 1.
        head_dim: key dim K; default V / 2, or D / 2H, as in xLSTM 7B.
        value_head_dim: value dim V; default 2 K, or D / H.
        input_gate: ``exp``: exponential, with a normaliser and a stabiliser (xLSTM). ``sigmoid``:
            without both (arXiv 2503.14376).
        gate_soft_cap: c; gate logits z become c tanh(z / c); null for no cap.
        conv_size: width of a short convolution on q, k, v; null for no convolution, as in xLSTM 7B.
        normalizer_eps: epsilon of the exponential gate's denominator, added after the division by
            exp(m_t) (1e-6 in xLSTM 7B).
    """

    input_gate: Literal["exp", "sigmoid"] = "exp"
    gate_soft_cap: Positive | None = 15.0
    conv_size: Size2 | None = None
    normalizer_eps: NotNegative = 0.0

    width = 128
    key_share = 0.5


@register_mixer("mlstm", symbol="X")
class MLSTM(LinearMixer):
    """mLSTM mixer (arXiv 2405.04517, eq. 19 to 27; arXiv 2503.13427; arXiv 2503.14376).

    C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, f_t = sigmoid(x W_f + b).

    Exponential gate: i_t = exp(x W_i + b) and h_t = q_t^T C_t / max(|q_t^T n_t|, 1), with q scaled by
    1 / sqrt(K). Sigmoid gate: i_t = sigmoid(x W_i + b) and h_t = q_t^T C_t. The output is LayerNorm(h)
    per head * sigmoid(x W_o).

    The normaliser n is one extra value column of ones. C and n are stored divided by exp(m_t), with
    m_t = max(log f_t + m_{t-1}, log i_t). h does not depend on m, which only keeps exponents below
    zero. m is stored as one more column of the state.
    """

    Options = MLSTMOptions
    paper = "arXiv 2405.04517; xLSTM 7B arXiv 2503.13427; sigmoid input gate arXiv 2503.14376"
    formula = "G_t = gamma_t 1^T 1, gamma_t = sigmoid(x_t W_g); input gate i_t, normaliser n_t"
    used_by = "xLSTM 7B"

    def __init__(self, options: MLSTMOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(heads, key_dim, value_dim, options.conv_size, conv_activation="silu")
        self.input_gate_proj = nn.Linear(sizes.hidden_size, heads)
        self.forget_gate_proj = nn.Linear(sizes.hidden_size, heads)
        self.gate_proj = nn.Linear(sizes.hidden_size, heads * value_dim, bias=False)
        self.norm = GroupedLayerNorm(heads, heads * value_dim, sizes.norm_eps)
        # V + 1 columns of a state are split into parts of a width that the op supports
        self.parts = value_parts(value_dim + 1)
        self.columns = -(-(value_dim + 1) // self.parts)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return xLSTM 7B; the sigmoid gate with unequal dims and a convolution, no cap; wide values."""
        return [
            {"num_heads": 2},
            {"num_heads": 3, "head_dim": 5, "value_head_dim": 7, "input_gate": "sigmoid",
             "conv_size": 4, "gate_soft_cap": None},
            {"num_heads": 1, "head_dim": 3, "value_head_dim": 258, "normalizer_eps": 1e-3},
        ]  # fmt: skip

    def init_parameters(self, std: float) -> None:
        """Set the gates to constants: forget little (logits 3 to 6 over heads), write little (-10)."""
        init.zeros_(self.input_gate_proj.weight)
        init.zeros_(self.forget_gate_proj.weight)
        init.constant_(self.input_gate_proj.bias, -10.0)
        init.copy_(self.forget_gate_proj.bias, torch.linspace(3.0, 6.0, self.num_heads))

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """Map x (B, T, D) to y (B, T, D); see the class."""
        q, k, v = self.project(x, cu_seqlens, cache)
        log_i = self._cap(to_float32(self.input_gate_proj(x)))
        log_f = F.logsigmoid(self._cap(to_float32(self.forget_gate_proj(x))))
        if self.options.input_gate == "sigmoid":
            i = torch.sigmoid(log_i)
            h = self.recur(q, k, v, cu_seqlens, cache, log_decay=log_f, write_scale=i)
        else:
            h = self._stabilised(q, k, v, log_i, log_f, cu_seqlens, cache)
        return self.o_proj(self.norm(h.flatten(-2)) * torch.sigmoid(self.gate_proj(x)))

    def _cap(self, z: torch.Tensor) -> torch.Tensor:
        cap = self.options.gate_soft_cap
        return z if cap is None else cap * torch.tanh(z / cap)

    def _stabilised(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_i: torch.Tensor,
        log_f: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        cache: Slot | None,
    ) -> torch.Tensor:
        """Return h (B, T, H, V) with the exponential gate."""
        stored = None if cache is None else cache.state("recurrent")
        state, start = None, None
        if stored is not None:
            state, start = stored[..., :-1], stored[:, :: self.parts, 0, -1]
        eps = self.options.normalizer_eps
        # without eps, h does not depend on m
        gates = (log_f, log_i) if eps else (log_f.detach(), log_i.detach())
        m_of_gates, m_before, m_last = stabiliser(*gates, start, cu_seqlens)
        m, m_before = m_of_gates.detach(), m_before.detach()
        # at most 0 up to rounding; subtract the excess without blocking the gradient
        log_decay = log_f + (m_before - m)
        log_decay = log_decay - log_decay.detach().clamp(min=0)
        columns = F.pad(v, (0, 1), value=1.0)
        columns = F.pad(columns, (0, self.parts * self.columns - columns.shape[-1]))
        o, state = linear_attention(
            q,
            k,
            columns.unflatten(-1, (self.parts, -1)).flatten(2, 3),
            log_decay=log_decay.repeat_interleave(self.parts, dim=2),
            write_scale=(log_i - m).exp().repeat_interleave(self.parts, dim=2),
            scale=self.scale,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            output_final_state=cache is not None,
        )
        if cache is not None and state is not None:
            m_last = m_last.repeat_interleave(self.parts, dim=1)
            column = m_last[..., None, None].expand(*state.shape[:-1], 1)
            cache.set_state("recurrent", torch.cat([state, column.to(state.dtype)], dim=-1))
        o = to_float32(o).unflatten(2, (-1, self.parts)).flatten(3)
        h, n = o[..., : self.value_dim], o[..., self.value_dim : self.value_dim + 1]
        floor = (-m).exp().clamp(min=torch.finfo(m.dtype).tiny).unsqueeze(-1)
        # everywhere else exp(m) cancels; here it is a part of the function
        added = eps * (m_of_gates - m).exp().unsqueeze(-1) if eps else 0.0
        return (h / (torch.maximum(n.abs(), floor) + added)).to(v.dtype)

    def states(self) -> dict[str, StateSpec]:
        """Return K x V per head, and two more columns with the exponential gate: n and m."""
        specs = super().states()
        if self.options.input_gate == "exp":
            shape = (self.num_heads * self.parts, self.key_dim, self.columns + 1)
            specs["recurrent"] = StateSpec(shape, torch.float32)
        return specs


def stabiliser(
    log_f: torch.Tensor,
    log_i: torch.Tensor,
    start: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute m_t = max(log f_t + m_{t-1}, log i_t) within each document, from m_0 = ``start`` or 0.

    A parallel scan over time in log2(T) steps. The element (a, b) of a token means
    m_t = max(a + m_before, b).

    Args:
        log_f, log_i: (B, T, H).
        start: (N, H), or None for zeros.
        cu_seqlens: (N + 1,) document boundaries, or None for one document per row.

    Returns:
        m_t and m_{t-1}, (B, T, H); and m after the last token of each document, (N, H).
    """
    batch, time, heads = log_f.shape
    if cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=log_f.device) * time
    else:
        bounds = cu_seqlens.long()
    if start is None:
        start = log_f.new_zeros(bounds.shape[0] - 1, heads)
    a, b = log_f.flatten(0, 1), log_i.flatten(0, 1)
    total = a.shape[0]
    # empty documents point past the end, to a row that is dropped
    filled = bounds[1:] > bounds[:-1]
    first = torch.where(filled, bounds[:-1], total)
    before = a.new_zeros(total + 1, heads).index_copy(0, first, start.to(a.dtype))[:total]
    opens = a.new_zeros(total + 1, 1).index_fill(0, first, 1.0)[:total].bool()
    b = torch.where(opens, torch.maximum(b, a + before), b)
    a = torch.where(opens, -torch.inf, a)
    shift = 1
    while shift < total:
        b = torch.cat([b[:shift], torch.maximum(b[shift:], b[:-shift] + a[shift:])])
        a = torch.cat([a[:shift], a[shift:] + a[:-shift]])
        shift *= 2
    before = torch.where(opens, before, F.pad(b, (0, 0, 1, 0))[:total])
    with_start = torch.cat([b, b.new_zeros(1, heads)])
    last = torch.where(filled[:, None], with_start[bounds[1:] - 1], start.to(b.dtype))
    return b.view_as(log_f), before.view_as(log_f), last
