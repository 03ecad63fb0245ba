"""DeltaNet: the delta rule without decay (arXiv 2406.06484), and the base of all delta rule mixers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrid.config.declare import Positive, Size, Size2
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.linear_mixer import LinearMixer
from hybrid.mixers.parts import (
    GatedRMSNorm,
    HeadOptions,
    divides,
    init_log_uniform,
    init_time_step,
    l2_normalize,
    softplus_log_decay,
    to_float32,
)


@dataclass(frozen=True)
class DeltaRuleOptions(HeadOptions):
    """Options of the mixers that use the delta rule.

    Attributes:
        num_heads: H, heads of v and of the state; default D / 128, at least 1.
        num_key_heads: heads of q and k, each shared by H / num_key_heads heads of v; default H.
        head_dim: key dim K; default V, or D / H.
        value_head_dim: value dim V; default K.
        conv_size: width of the short convolution on q, k, v; null for no convolution.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that a transition can flip the sign
            of stored values (arXiv 2411.12537).
        output_gate: gate the normalised output.
        output_norm_eps: epsilon of the output norm; default the model's ``norm_eps``.
    """

    num_key_heads: Size | None = None
    conv_size: Size2 | None = 4
    negative_eigenvalues: bool = False
    output_gate: bool = True
    output_norm_eps: Positive | None = None

    width = 128

    def complete(self, hidden_size: int) -> DeltaRuleOptions:
        """Return these options with heads and dims filled in."""
        done = super().complete(hidden_size)
        assert isinstance(done, DeltaRuleOptions)
        keys = done.num_heads if self.num_key_heads is None else self.num_key_heads
        return replace(done, num_key_heads=keys)

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of sizes."""
        lines = super().problems(sizes)
        done = self.complete(sizes.hidden_size)
        if not lines:
            assert done.num_key_heads is not None
            assert done.num_heads is not None
            lines += divides("num_key_heads", done.num_key_heads, "num_heads", done.num_heads)
        return lines


class DeltaRuleMixer(LinearMixer):
    """Base class of delta rule mixers.

    S_t = G_t * (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = q_t^T S_t / sqrt(K).

    A short convolution and SiLU apply to q, k, v; q and k are L2-normalised. beta is sigmoid(x W_beta),
    or twice that with ``negative_eigenvalues``. The output is RMSNorm(o) per head, then gated.
    Subclasses define G_t in ``gates``.
    With several writes per token, ``gates`` returns a beta for each, and subclasses override ``mix``.
    """

    gate_activation = "silu"

    def __init__(
        self, options: DeltaRuleOptions, sizes: Sizes, layer_idx: int, writes: int = 1
    ) -> None:
        super().__init__(options, sizes, layer_idx)
        heads, key_dim, value_dim = options.sizes
        self.scale = key_dim**-0.5
        self.build(
            heads,
            key_dim,
            value_dim,
            options.conv_size,
            key_heads=options.num_key_heads,
            conv_activation="silu",
            writes=writes,
        )
        self.build_strength(sizes, writes)
        self.gate_proj = self.build_gate() if options.output_gate else None
        eps = sizes.norm_eps if options.output_norm_eps is None else options.output_norm_eps
        self.norm = GatedRMSNorm(value_dim, eps, self.gate_activation)

    def build_strength(self, sizes: Sizes, writes: int) -> None:
        """Create what ``strength`` needs."""
        self.beta_proj = nn.Linear(sizes.hidden_size, writes * self.num_heads, bias=False)

    def build_gate(self) -> nn.Module:
        """Return the projection of the output gate, D -> H * V."""
        return nn.Linear(self.sizes.hidden_size, self.num_heads * self.value_dim, bias=False)

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return grouped heads with unequal dims; negative eigenvalues without convolution and gate."""
        return [
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 8},
            {"num_heads": 2, "conv_size": None, "negative_eigenvalues": True,
             "output_gate": False, "output_norm_eps": 1e-3},
        ]  # fmt: skip

    def features(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply SiLU, then normalise q and k to length 1."""
        if self.conv is None:  # otherwise the convolution applies SiLU
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        return l2_normalize(q), l2_normalize(k), v

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return beta (B, T, writes * H)."""
        return self.strength(x)

    def strength(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the op's arguments for how strongly tokens write: beta (B, T, writes * H)."""
        beta = torch.sigmoid(to_float32(self.beta_proj(x)))
        return {"beta": 2 * beta if self.options.negative_eigenvalues else beta}

    def read(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm(o) per head, times the activated gate: (B, T, H * V)."""
        return self.norm(o, None if self.gate_proj is None else self.gate_proj(x))

    def mixing_flops(self, context: int) -> float:
        """Count decay, recall, write and read of a K x V state per head: 7 FLOPs per element."""
        return 7.0 * self.num_heads * self.key_dim * self.value_dim


class ScalarDecayDeltaRule(DeltaRuleMixer):
    """Base class of delta rule mixers with one data-dependent decay per head, as in Mamba-2.

    G_t = exp(-exp(A_log) softplus(x W_a + dt_bias)) (arXiv 2412.06464, section 3.4).
    """

    def build_decay(self) -> None:
        """Create the projection and the parameters of the decay."""
        self.decay_proj = nn.Linear(self.sizes.hidden_size, self.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))

    def init_parameters(self, std: float) -> None:
        """Draw exp(A_log) uniformly from (0, 16] and time steps as in Mamba-2."""
        if "A_log" in self._parameters:
            init_log_uniform(self.A_log, 0.01, 16.0)  # away from 0, whose log is -inf
            init_time_step(self.dt_bias)

    def gates(self, x: torch.Tensor) -> dict[str, Any]:
        """Return beta (B, T, writes * H) and, after ``build_decay``, log G_t (B, T, H)."""
        gates = super().gates(x)
        if "A_log" in self._parameters:
            decay = softplus_log_decay(self.decay_proj(x), self.dt_bias, self.A_log)
            gates["log_decay"] = decay
        return gates


@dataclass(frozen=True)
class DeltaNetOptions(DeltaRuleOptions):
    """Options of ``delta_net``: those of the delta rule, without a gate by default as in the paper."""

    output_gate: bool = False


@register_mixer("delta_net", symbol="P")
class DeltaNet(DeltaRuleMixer):
    """DeltaNet mixer (arXiv 2406.06484, eq. 3).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.
    """

    Options = DeltaNetOptions
    paper = "arXiv 2406.06484; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T"
    used_by = "DeltaNet"

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Return the options of the paper; and grouped heads with a gate and negative eigenvalues."""
        return [
            {"num_heads": 2},
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 5,
             "output_gate": True, "negative_eigenvalues": True, "conv_size": None},
        ]  # fmt: skip
