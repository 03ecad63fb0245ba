"""Gated DeltaProduct: several steps of the delta rule per token (arXiv 2502.10297).

Shapes: B batch, T time, H heads, H_k key heads, K key dim, V value dim, n steps per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hybrid.config.declare import Size
from hybrid.config.registry import register_mixer
from hybrid.config.sizes import Sizes
from hybrid.mixers.delta_net import DeltaRuleOptions, ScalarDecayDeltaRule
from hybrid.nn.past import Slot


@dataclass(frozen=True)
class GatedDeltaProductOptions(DeltaRuleOptions):
    """Options of ``gated_delta_product``: those of the delta rule, and

    Attributes:
        num_householder: n, steps of the delta rule per token. Each has its own key, value and beta; 1 is
            gated DeltaNet. Compute and the projections of k and v grow with n; the state does not.
        negative_eigenvalues: beta in (0, 2), the paper's default: a product of two reflections is a
            rotation. false: beta in (0, 1).
        decay: apply a scalar decay before the first step of each token; false for DeltaProduct.
    """

    num_householder: Size = 2
    negative_eigenvalues: bool = True
    decay: bool = True


@register_mixer("gated_delta_product", symbol="d")
class GatedDeltaProduct(ScalarDecayDeltaRule):
    """Gated DeltaProduct mixer: n delta rule steps per token (arXiv 2502.10297).

    S_{t,0} = gamma_t S_{t-1}; for j = 1 to n, with k, v and beta of step j of token t,
    S_{t,j} = (I - beta k k^T) S_{t,j-1} + beta k v^T; S_t = S_{t,n}; o_t = q_t^T S_t / sqrt(K).
    Decay, convolution, normalisation, output norm and output gate are those of gated DeltaNet.

    The op runs on a sequence of n T steps. The decay applies at the first step of each token, and the
    output is read at the last.
    """

    Options = GatedDeltaProductOptions
    paper = "arXiv 2502.10297; negative eigenvalues arXiv 2411.12537"
    formula = "S_t = gamma_t S_{t-1} prod_j (I - beta_j k_j k_j^T) + sum_j ..., n steps j per token"
    used_by = "DeltaProduct"

    def __init__(self, options: GatedDeltaProductOptions, sizes: Sizes, layer_idx: int) -> None:
        super().__init__(options, sizes, layer_idx, writes=options.num_householder)
        self.steps = options.num_householder
        if options.decay:
            self.build_decay()

    @classmethod
    def samples(cls) -> list[dict[str, Any]]:
        """Two steps, grouped heads, unequal dims; three, no decay, gate or convolution; wide values."""
        return [
            {"num_heads": 4, "num_key_heads": 2, "head_dim": 6, "value_head_dim": 8},
            {"num_heads": 2, "num_householder": 3, "decay": False, "conv_size": None,
             "negative_eigenvalues": False, "output_gate": False},
            {"num_heads": 1, "head_dim": 4, "value_head_dim": 258, "num_householder": 1},
        ]  # fmt: skip

    def mix(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Slot | None
    ) -> torch.Tensor:
        """See the class."""
        n = self.steps
        q, k, v = self.project(x, cu_seqlens, cache)
        gates = self.gates(x)
        q, k, v = self._at_step(q, n - 1), self._steps(k), self._steps(v)
        gates["beta"] = self._steps(gates["beta"].unsqueeze(-1)).squeeze(-1)
        if "log_decay" in gates:  # 0 is no decay
            gates["log_decay"] = self._at_step(gates["log_decay"], 0)
        decoding = x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()
        if decoding and cache is not None:
            # the op is faster on single steps than on a short chunk, by 9x at n = 2
            parts = [[y.narrow(1, j, 1) for y in (q, k, v)] for j in range(n)]
            now = [{name: y.narrow(1, j, 1) for name, y in gates.items()} for j in range(n)]
            o = [self.recur(*parts[j], None, cache, **now[j]) for j in range(n)][-1]
        else:
            bounds = None if cu_seqlens is None else cu_seqlens * n
            o = self.recur(q, k, v, bounds, cache, **gates)[:, n - 1 :: n]
        return self.o_proj(self.read(o, x))

    def _steps(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, n * heads, dim) -> (B, T * n, heads, dim)."""
        return y.unflatten(2, (self.steps, -1)).flatten(1, 2)

    def _at_step(self, y: torch.Tensor, step: int) -> torch.Tensor:
        """(B, T, ...) -> (B, T * n, ...), y at one step of each token, 0 at the others."""
        rest = (0, 0) * (y.ndim - 2)
        return F.pad(y.unsqueeze(2), (*rest, step, self.steps - 1 - step)).flatten(1, 2)

    def mixing_flops(self, context: int) -> float:
        """One decay and read, n recalls and writes of a K x V state: 1 + 2 + 4 n FLOPs an element."""
        return (3.0 + 4.0 * self.steps) * self.num_heads * self.key_dim * self.value_dim
